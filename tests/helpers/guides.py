"""The blocks of the README and of the guides in docs/, run as a reader would run them.

A fenced block states its kind. `bash` holds commands, `console` commands behind "$ " with what they
print, `python` code; all of a page run in order, in one folder and one namespace. `json`, `jsonl`
and `toml` are data, and `text` is neither. A comment in the line before a block changes that:

    <!-- file: photos.toml -->         the block is written to this file first
    <!-- not run: takes 20 minutes --> its commands are only parsed
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_smolvlm  # noqa: F401  (before mlx.core, so that it loads OpenBLAS)

# isort: split
import mlx.core as mx
import typer.main
from PIL import Image

from mlx_smolvlm.convert.catalog import list_figures
from mlx_smolvlm.convert.hub import ALIASES
from mlx_smolvlm.generate.memory_plan import Machine
from tests.helpers import hf_folder
from tests.helpers.command import COMMAND, run_text
from tests.helpers.dumb_terminal import Terminal
from tests.helpers.fake_hub import FakeHub
from tests.helpers.forked_command import Runner

ROOT = Path(__file__).parents[2]
KINDS = ("bash", "console", "python", "json", "jsonl", "toml", "text")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(
    r"^(?:<!-- (?P<key>file|not run): (?P<value>[^\n]+) -->\n)?"
    r"^(?P<indent> *)```(?P<kind>[\w-]*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
# What the examples of the guides are called, and the picture or clip that stands in for them.
FILES = {
    "photo.jpg": "objects.png",
    "photo.heic": "objects.png",
    "beach.jpg": "three.png",
    "before.jpg": "two.png",
    "after.jpg": "four.png",
    "receipt.jpg": "page.png",
    "page.png": "page.png",
    "chart.png": "chart.png",
    "holiday/1.jpg": "one.png",
    "holiday/2.jpg": "two.png",
    "clip.mp4": "left.mp4",
    "film.mp4": "colors.mp4",
    "screen.mov": "up.mp4",
    "a.png": "one.png",
    "b.png": "two.png",
    **{f"photos/{label}/{n}.jpg": "one.png" for label in ("ripe", "unripe") for n in range(3)},
}
MAC = Machine("mlx-gpu", 2, 8 * 2**30)  # with 8 GB
CONVERTED = "smolvlm-500m"  # the alias whose stand-in is converted on first use
ROW = '{"image": "%s", "question": "What is there?", "answers": ["A red cross."]}\n'
# Commands that set up a machine, with the file that tests them and what it says.
ELSEWHERE = {
    "make demo": ("tests/test_makefile.py", 'machine.make("demo")'),
    "make test": ("tests/test_makefile.py", 'machine.make("test")'),
    "source .venv/bin/activate": ("tests/test_makefile.py", "Next: source .venv/bin/activate"),
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: Where its text begins, from 1.
        key: "file" or "not run", with its `value`; "" without a comment.
    """

    page: Path
    line: int
    kind: str
    text: str
    key: str
    value: str

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a block, and what the page says that it prints; None if it says nothing."""

    line: str
    shown: str | None


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of `page`."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        blocks.append(
            Block(page, line, match["kind"], body, match["key"] or "", match["value"] or "")
        )
    assert text.count("```") == 2 * len(blocks), f"{page}: a fence that is not read"
    return blocks


def read_commands(block: Block) -> Iterator[Command]:
    """The commands of a `bash` or `console` block."""
    text = block.text.replace("\\\n", " ")
    if block.kind == "bash":
        for loop_or_line in re.findall(r"(?m:^for (?s:.*?)^done$|^.+$)", text):
            line = re.sub("(^| +)#.*", "", loop_or_line)
            yield from [Command(line, None)] * bool(line)
        return
    assert text.startswith("$ "), f"{block.place}: a console block begins with '$ '"
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        yield Command(line, shown)


def parse_command(line: str) -> dict[str, Any]:
    """Check the options of an `mlx-smolvlm` command without running it.

    Returns:
        Its parameters by name.

    Raises:
        Exception: Typer's, if it has an option or a value that the command does not take.
    """
    from mlx_smolvlm.cli.command_table import app

    name, *arguments = shlex.split(line, comments=True)
    assert name == "mlx-smolvlm", line
    command: Any = typer.main.get_command(app)
    context = None
    while arguments and arguments[0] in getattr(command, "commands", {}):
        context = command.make_context(name, arguments[:1], parent=context)
        command, arguments = command.commands[arguments[0]], arguments[1:]
    parameters: dict[str, Any] = command.make_context(name, arguments, parent=context).params
    return parameters


def _is_conversation(line: str) -> bool:
    """Whether `line` begins a conversation on a terminal."""
    is_chat = re.match(r"mlx-smolvlm chat\b[^|<>;&]*$", line)
    return is_chat is not None and not parse_command(line).get("prompt")


class Desk:
    """A folder with the files that the guides speak of, and a hub whose models are the demo."""

    def __init__(self, folder: Path, environment: Mapping[str, str], runner: Runner | None) -> None:
        self.folder, self.environment, self.runner = folder, dict(environment), runner
        self.namespace: dict[str, Any] = {"__name__": "guide"}
        folder.mkdir(parents=True)
        (folder / "examples").symlink_to(ROOT / "examples")
        for name, example in FILES.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".png", ".mp4", ".mov"):
                shutil.copy(ROOT / "examples" / example, path)
            else:
                Image.open(ROOT / "examples" / example).convert("RGB").save(path, "JPEG")
        (folder / "data").mkdir()
        (folder / "data" / "test.jsonl").write_text(ROW % "../a.png")
        (folder / "docvqa.jsonl").write_text(ROW % "a.png")

    def run_block(self, block: Block) -> None:
        """Run or check `block`.

        Raises:
            AssertionError: A command fails, or prints something else than the page says.
        """
        if block.key == "file":
            (self.folder / block.value).write_text(block.text)
        if block.kind == "json":
            json.loads(block.text)
        elif block.kind == "jsonl":
            [json.loads(line) for line in block.text.splitlines()]
        elif block.kind == "toml":
            tomllib.loads(block.text)
        elif block.kind == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
            if block.key != "not run":
                exec(code, self.namespace)
        elif block.kind in ("bash", "console"):
            for command in read_commands(block):
                if command.line in ELSEWHERE:
                    continue
                if block.key == "not run":
                    check_unrun(command.line)
                elif _is_conversation(command.line):
                    self.check(block, command, self.run_session(command))
                else:
                    self.check(block, command, self.run_command(block, command.line))

    def run_command(self, block: Block, line: str) -> list[str]:
        """Run `line`; the texts that a page may show for it."""
        if line.startswith("mlx-smolvlm ") and not re.search(r"[|<>;*$]|&&", line):
            words = shlex.split(line, comments=True)[1:]
            done = run_text(
                *words, env=self.environment, cwd=self.folder, timeout_s=120, runner=self.runner
            )
        else:
            done = self.run_in_shell(line)
        assert done.returncode == 0, f"{block.place}: {line}\n{done.stdout}{done.stderr}"
        return [done.stdout, done.stderr + done.stdout, done.stderr]

    def run_in_shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run `line` in bash, where `mlx-smolvlm` and `python` are those of this process."""
        programs = self.folder.parent / "programs"
        programs.mkdir(exist_ok=True)
        starts = {"mlx-smolvlm": COMMAND, "python": [sys.executable]}
        for name, words in starts.items():
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            (programs / name).chmod(0o755)
        path = f"{programs}:{self.environment['PATH']}"
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env={**self.environment, "PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def run_session(self, command: Command) -> list[str]:
        """Type the lines behind "> " that the page shows; what the terminal shows then."""
        words = shlex.split(command.line)[1:]
        terminal = Terminal(*COMMAND[1:], *words, env=self.environment, cwd=self.folder)
        try:
            shown = [terminal.expect("> $").removesuffix("> ")]
            for typed in re.findall("^> (.*)$", command.shown or "", re.MULTILINE):
                terminal.send(f"{typed}\n")
                shown.append("> " + terminal.expect("\n> $").removesuffix("> "))
            terminal.send("\x04")
            assert terminal.status() == 0
        finally:
            terminal.close()
        # On a slow machine, a line of progress is shown and erased.
        return [re.sub(r"[^\n]*\x1b\[K|\x1b\[\d*m|\r", "", "".join(shown))]

    def check(self, block: Block, command: Command, printed: list[str]) -> None:
        """Compare what is printed with what the page shows.

        "..." stands for anything, and a number with a decimal point for any such number.
        """
        if command.shown is None:
            return
        wanted = _squeeze(command.shown)
        pattern = ".*?".join(map(re.escape, wanted.split("...")))
        pattern = re.sub(r"\d+\\\.\d+", r"\\d+\\.\\d+", pattern)
        assert any(re.fullmatch(pattern, _squeeze(text), re.DOTALL) for text in printed), (
            f"{block.place}: {command.line}\nshown:\n{wanted}\nprinted:\n{printed[0]}"
        )


def _squeeze(text: str) -> str:
    """`text` without empty lines and blanks at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def check_unrun(line: str) -> None:
    """Parse `line` if it is one of ours."""
    if line.startswith("mlx-smolvlm"):
        parse_command(line)


def fill_hub(hub: FakeHub, folder: Path) -> None:
    """Publish the demo under the name of every alias; `CONVERTED` is of Hugging Face's format.

    That one has random weights, and says nothing: its likeliest token ends the answer.
    """
    files = _read_files(ROOT / "mlx_smolvlm" / "demo")
    hub.repos.update({repo: dict(files) for repo in ALIASES.values()})
    values = hf_folder.askable_settings()
    tensors = hf_folder.weights(values, mx.bfloat16)
    head = next(name for name in tensors if "lm_head" in name)
    tensors[head] = mx.zeros_like(tensors[head])
    hf_folder.make_askable(folder, values, tensors)
    hf_folder.write_json(folder / "generation_config.json", {"eos_token_id": 0})
    hub.repos[ALIASES[CONVERTED]] = _read_files(folder)


def _read_files(folder: Path) -> dict[str, bytes]:
    """The files in `folder` by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_model_table() -> str:
    """The README's table of models, as estimated for `MAC`."""
    figures = list_figures(MAC)
    lines = [
        "| model | good at | download | memory at 16, 8, 4 bits | a Mac with 8 GB uses |",
        "|---|---|---|---|---|",
    ]
    for one in sorted(figures, key=lambda one: (one.answer_bytes[16], one.download_bytes)):
        sizes = ", ".join(f"{size / 1e9:.1f}" for size in one.answer_bytes.values())
        download = format_gb(one.download_bytes) if one.download_bytes else "bundled"
        row = (f"`{one.alias}`", one.good_at, download, f"{sizes} GB", f"{one.fits_bits} bits")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def format_gb(size: int) -> str:
    """`size` in GB, as the README says it."""
    return f"{size / 1e9:.1f} GB"
