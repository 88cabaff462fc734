"""Help texts, completion in shells, and `python -m mlx_smolvlm`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from mlx_smolvlm.cli.command_table import app
from mlx_smolvlm.cli.help import GROUPS
from tests.helpers.command import environment, run_text
from tests.helpers.pty_terminal import Emulator

SHELL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], [sys.argv[1], "-i"])
"""


def test_every_option_is_in_one_group() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, groups in GROUPS.items():
        context = typer.Context(commands[name])
        names = [max(one.opts, key=len) for one in commands[name].get_params(context)]
        options = sorted(one for one in names if one.startswith("-"))
        assert sorted(" ".join(groups.values()).split()) == options, name


def test_the_help_of_chat_is_in_groups() -> None:
    done = run_text("chat", "-h")
    assert done.returncode == 0
    titles = [line for line in done.stdout.splitlines() if line.endswith(":") and line[0] != " "]
    groups = ["Basics", "Pictures and video", "Answer", "Model", "Memory", "Output"]
    assert titles == [f"{title}:" for title in ("Arguments", *groups)]
    basics = done.stdout.partition("Basics:\n")[2].partition("\n\n")[0]
    assert basics.startswith("  -i, --image IMAGE            A path, ")
    assert "--max-tokens" not in basics
    answer = done.stdout.partition("Answer:\n")[2].partition("\n\n")[0]
    assert answer.startswith("  --max-tokens N               The longest answer")  # aligned


@pytest.mark.parametrize("arguments", [(), ("chat", "--help"), ("--version",)], ids=str)
def test_the_module_is_the_command(arguments: tuple[str, ...]) -> None:
    ways = [
        subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=environment(),
            capture_output=True,
            text=True,
        )
        for module in ("mlx_smolvlm", "mlx_smolvlm.cli.app")
    ]
    assert ways[0].returncode == ways[1].returncode
    assert (ways[0].stdout, ways[0].stderr) == (ways[1].stdout, ways[1].stderr)


def list_imports(*arguments: str, **changes: str) -> tuple[str, set[str]]:
    """What the command writes to stdout, and the modules that it imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mlx_smolvlm", *arguments],
        env=environment(**changes),
        capture_output=True,
        text=True,
    )
    return done.stdout, {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


HEAVY = {"mlx.core", "numpy", "PIL", "av", "prompt_toolkit", "huggingface_hub", "tokenizers"}


def test_help_and_completion_import_nothing_heavy() -> None:
    _, modules = list_imports("chat", "-h")
    assert "typer" in modules
    assert not modules & {*HEAVY, "rich"}
    completing = {"_MLX_SMOLVLM_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    out, modules = list_imports(**completing, COMP_WORDS="mlx-smolvlm chat --mem")
    assert out == "--memory-limit\n"
    assert not modules & HEAVY
    out, _ = list_imports(**completing, COMP_WORDS="mlx-smolvlm chat pho")
    assert out == "\n"  # the shell completes a file


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_options_and_paths(tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        assert "REQUIRE_PROGRAMS" not in os.environ, f"install {shell}"  # as .ci/run does
        pytest.skip(f"there is no {shell}")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "mlx-smolvlm"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m mlx_smolvlm "$@"\n')
    command.chmod(0o755)
    (tmp_path / "a photograph.png").touch()
    env = environment(
        HOME=str(tmp_path),
        PATH=f"{command.parent}:{os.environ['PATH']}",
        PYTHONPATH=str(Path(__file__).parents[2]),
        TERM="xterm",
    )
    for name in ("ZDOTDIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "ENV", "BASH_ENV"):
        env.pop(name, None)
    done = subprocess.run(
        [shell, "-c", f"cd {tmp_path}; mlx-smolvlm --install-completion; true"],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert f"{shell} completion installed in {tmp_path}" in done.stdout, done.stderr
    terminal = Emulator(["-c", SHELL, shell], {**env, "PWD": str(tmp_path)}, (100, 30))
    try:
        terminal.send(f"cd {tmp_path}; echo ready | tr a-z A-Z\r")
        terminal.expect(r"(?m)^READY")
        terminal.send("mlx-smolvlm cha\t")
        terminal.expect(r"mlx-smolvlm chat")
        terminal.send("--temp\t")
        terminal.expect(r"chat --temperature")
        terminal.send("0 -i a\t")
        terminal.expect(r"--temperature 0 -i a\\ photograph\.png")
    finally:
        terminal.close()
