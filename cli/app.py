"""The command table, and the one place that turns errors into exit statuses.

0 is success, 1 an error, 2 a wrong option, 130 Ctrl-C, 141 a closed stdout.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from mlx_smolvlm.cli.ask_commands import CHAT_EPILOG, CHOOSE_EPILOG, chat, choose
from mlx_smolvlm.cli.convert_commands import COMPARE_EPILOG, compare, convert, doctor
from mlx_smolvlm.cli.models import app as models_app
from mlx_smolvlm.cli.render import (
    OutputClosedError,
    fail,
    os_fault,
    out_of_memory,
    prepare_streams,
    say,
    write,
)
from mlx_smolvlm.cli.train_commands import EVAL_EPILOG, TRAIN_EPILOG, evaluate, train
from mlx_smolvlm.errors import SmolVLMError
from mlx_smolvlm.quoting import message_line

OUTPUT_CLOSED = 141
# Of Click or of the part of it in Typer, by version; Typer exports neither.
_ClickError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Run the SmolVLM family of vision-language models with MLX, on this machine.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich is slow to import and to render
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command in `sys.argv`; leaves by SystemExit."""
    prepare_streams()
    try:
        sys.exit(app(prog_name="mlx-smolvlm", standalone_mode=False))
    except _ClickError as error:
        if len(sys.argv) > 1:  # without arguments, the message is the help
            error.message = message_line(error.message)
        error.show()
        sys.exit(error.exit_code)
    except typer.Abort:
        say("Aborted!")
    except OutputClosedError:
        sys.exit(OUTPUT_CLOSED)
    except SmolVLMError as error:
        fail(error)
    except OSError as error:
        fail(os_fault(error))
    except (MemoryError, RuntimeError) as error:
        if (message := out_of_memory(error)) is None:
            raise
        fail(message)
    sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        from mlx_smolvlm import __version__

        write(f"mlx-smolvlm {__version__}\n")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


app.command(epilog=CHAT_EPILOG)(chat)
app.command(epilog=CHOOSE_EPILOG)(choose)
app.command("eval", epilog=EVAL_EPILOG)(evaluate)
app.command()(convert)
app.command(epilog=COMPARE_EPILOG)(compare)
app.command(epilog=TRAIN_EPILOG)(train)
app.command()(doctor)
app.add_typer(models_app, name="models")


if __name__ == "__main__":
    main()
