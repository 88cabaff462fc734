"""What a document shows of the program, with the answers of a checkpoint."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import mlx_smolvlm as smolvlm
from mlx_smolvlm.cli.media import describe_cost, open_picture

_BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
_COMMAND = "$ mlx-smolvlm chat"


def retell(text: str, vlm: smolvlm.SmolVLM, root: Path) -> str:
    """`text` with what follows each question in its console blocks as `vlm` answers it.

    Args:
        root: The folder in which the commands are typed.
    """
    return _BLOCK.sub(lambda block: "".join(_retell_lines(block[0].splitlines(), vlm, root)), text)


def _retell_lines(shown: list[str], vlm: smolvlm.SmolVLM, root: Path) -> Iterator[str]:
    """The lines of a block: what was typed as it is, each followed by what is said to it."""
    chat, pictures = vlm.chat(), list[Path]()
    for line in shown:
        if line.startswith("demo: "):  # the program's greeting
            yield f"{line}\n"
        if not line.startswith(("$ ", "> ")):
            continue
        yield f"{line}\n"
        typed = line[2:]
        if line.startswith(f"{_COMMAND} "):
            yield f"{_run_command(line.removeprefix(_COMMAND), vlm, root)}\n"
        elif typed == "/undo":
            yield f"took back: {chat.undo()}\n"
        elif line[0] == ">" and (root / typed).is_file():
            pictures.append(root / typed)
            yield f"{describe_cost(vlm, open_picture(str(root / typed)), 'high')}\n"
        elif line[0] == ">":
            yield f"{chat.ask(typed, images=pictures).text}\n"
            pictures = []


def _run_command(arguments: str, vlm: smolvlm.SmolVLM, root: Path) -> str:
    """What `chat` with `arguments` says: a question, pictures and videos."""
    images, videos, prompt = list[Path](), list[Path](), ""
    words = iter(shlex.split(arguments))
    for word in words:
        if word in ("-i", "--image"):
            images.append(root / next(words))
        elif word in ("-v", "--video"):
            videos.append(root / next(words))
        else:
            prompt = word
    return vlm.ask(prompt, images=images, videos=videos).text
