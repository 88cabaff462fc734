"""The commands, and the one place that turns errors into exit statuses."""

from __future__ import annotations

import copy
import io
import os
import sys
from typing import Annotated, Any

import typer

from mlx_smolvlm.cli.bench import BENCH_EPILOG, bench
from mlx_smolvlm.cli.chat import CHAT_EPILOG, chat
from mlx_smolvlm.cli.choose import CHOOSE_EPILOG, choose
from mlx_smolvlm.cli.compare import COMPARE_EPILOG, compare
from mlx_smolvlm.cli.convert import convert
from mlx_smolvlm.cli.doctor import doctor
from mlx_smolvlm.cli.evaluate import EVAL_EPILOG, evaluate
from mlx_smolvlm.cli.help import GroupedCommand
from mlx_smolvlm.cli.models import app as models_app
from mlx_smolvlm.cli.output import (
    OutputClosedError,
    describe_memory_error,
    describe_os_error,
    discard,
    fail,
    prepare_streams,
    say,
    write,
)
from mlx_smolvlm.cli.paths import SUFFIXES
from mlx_smolvlm.cli.train import TRAIN_EPILOG, train
from mlx_smolvlm.errors import SmolVLMError, format_message

OUTPUT_CLOSED = 141
CHAT_OPTIONS = ("-i", "--image", "-v", "--video", "-m", "--model")  # that may come first
COMPLETION_VARIABLE = "_MLX_SMOLVLM_COMPLETE"
# Of Click or of the part of it in Typer, by version; Typer exports neither.
_ClickError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Run the SmolVLM family of vision-language models with MLX, on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich is slow to import and to render
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def reduce_app(arguments: list[str]) -> typer.Typer:
    """Return `app` with only the command that `arguments` begin with, if there is one.

    Typer inspects the options of every command that it has, which takes 3 ms each.
    """
    commands = {one.name or one.callback.__name__: one for one in app.registered_commands}  # type: ignore[union-attr]
    if not arguments or arguments[0] not in commands:
        return app
    reduced = copy.copy(app)
    reduced.registered_commands = [commands[arguments[0]]]
    reduced.registered_groups = []
    reduced._add_completion = False  # --install-completion comes before a command
    return reduced


def expand_shorthand(arguments: list[str]) -> list[str]:
    """Return `arguments` with the command `chat` if they begin with a picture or a question.

    These are words that no command and no option could be: the name of a picture or video, and
    what has a space in it. An option of `chat` with its value is a beginning, too.
    """
    first = arguments[0] if arguments else ""
    if first.startswith("-"):
        option, equals, _ = first.partition("=")
        is_chat = option in CHAT_OPTIONS and (len(arguments) > 1 or bool(equals))
    else:
        is_chat = first.lower().endswith(SUFFIXES) or len(first.split()) > 1
    return ["chat", *arguments] if is_chat else arguments


def _complete_at_first_tab() -> None:
    """Add to Typer's script for zsh, with which the first Tab in a shell only loads it.

    Click's own script ends like this, too.
    """
    from typer import _completion_shared

    _completion_shared._completion_scripts["zsh"] += (
        'if [[ $zsh_eval_context[-1] == loadautofunc ]]; then %(complete_func)s "$@"; fi\n'
    )


def run_command() -> int:
    """Run the command in `sys.argv`, and print the error if there is one.

    Returns:
        The exit status.
    """
    prepare_streams()
    if COMPLETION_VARIABLE in os.environ:  # set by the script that --install-completion installs
        app(prog_name="mlx-smolvlm")
    if sys.argv[1:2] in (["--install-completion"], ["--show-completion"]):
        _complete_at_first_tab()
    arguments = expand_shorthand(sys.argv[1:])
    command = typer.main.get_command(reduce_app(arguments))
    try:
        # Click's `main` without its handling of errors, by which a pipe that nobody reads ends
        # the process with status 1 and without a word.
        with command.make_context("mlx-smolvlm", arguments) as context:
            return command.invoke(context) or 0
    except typer.Exit as ending:
        return ending.exit_code
    except _ClickError as error:
        if len(sys.argv) > 1:  # without arguments, the message is the help
            # Typer checks values with Pydantic, which writes this in front of each message.
            error.message = format_message(error.message.removeprefix("Value error, "))
        text = io.StringIO()
        error.show(text)
        say(text.getvalue(), end="")
        return int(error.exit_code)
    except (typer.Abort, EOFError):
        say("Aborted!")
    except OutputClosedError:
        return OUTPUT_CLOSED
    except SmolVLMError as error:
        fail(error)
    except OSError as error:
        discard(sys.stdout)  # what is left of a help text, which Click prints by itself
        if isinstance(error, BrokenPipeError):
            return OUTPUT_CLOSED
        fail(describe_os_error(error))
    except (MemoryError, RuntimeError) as error:
        if (message := describe_memory_error(error)) is None:
            raise
        fail(message)
    return 1


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


app.command(cls=GroupedCommand, epilog=CHAT_EPILOG)(chat)
app.command(cls=GroupedCommand, epilog=CHOOSE_EPILOG)(choose)
app.command("eval", cls=GroupedCommand, epilog=EVAL_EPILOG)(evaluate)
app.command(cls=GroupedCommand)(convert)
app.command(cls=GroupedCommand, epilog=COMPARE_EPILOG)(compare)
app.command(epilog=TRAIN_EPILOG)(train)
app.command(cls=GroupedCommand, epilog=BENCH_EPILOG)(bench)
app.command()(doctor)
app.add_typer(models_app, name="models")
