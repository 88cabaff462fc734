"""The interactive program in tmux, which wraps lines again when a pane becomes narrower.

The emulator of the other tests cuts them instead.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import pty_terminal
from tests.helpers.pty_terminal import Program

PARAGRAPHS = [
    f"Paragraph {n} of the **answer** goes on with *many* words until its line breaks, and then "
    f"with some more of them, {n}."
    for n in range(8)
]
ANSWER = "{hold}".join(
    [
        "# Heading\n\n" + "\n\n".join(PARAGRAPHS[:5]) + "\n\nA line that",
        " goes on, and",
        " on.\n\n- item one\n- item two, whose words wrap in a narrow pane, and",
        " go on\n\n| a | b |\n|---|---|\n| cell one | cell two |\n\n" + "\n\n".join(PARAGRAPHS[5:]),
        "\n\nThe end.",
    ]
)


class Pane:
    """A program in a pane of a tmux server of its own."""

    def __init__(self, folder: Path, answers: dict[str, str], columns: int) -> None:
        # Not in the test's folder, since the path of a socket may have 104 bytes on a Mac.
        self._folder = tempfile.TemporaryDirectory(dir="/tmp")
        self._tmux = ("tmux", "-u", "-S", f"{self._folder.name}/tmux", "-f", "/dev/null")
        self.program = Program(folder, answers, {})
        script = folder / "program.py"  # in tmux, the program has a controlling terminal already
        script.write_text(pty_terminal.PROGRAM.replace("fcntl.ioctl(0, termios.TIOCSCTTY, 0)", ""))
        # A second pane, as wide as the first one is not, so that a border moves between them.
        env = {**self.program.env, "PYTHONPATH": str(Path(__file__).parents[2])}
        env.pop("TERM"), env.pop("TMUX")
        command = shlex.join([sys.executable, str(script), "chat"])
        size = ("-x", "200", "-y", "30")
        subprocess.run(
            [*self._tmux, "new-session", "-d", *size, f"{command}; cat"], env=env, check=True
        )
        self.run("split-window", "-h", "cat")
        self.resize(columns)

    def run(self, *arguments: str) -> str:
        """Run a command of tmux; what it prints."""
        result = subprocess.run(
            [*self._tmux, *arguments], check=True, capture_output=True, text=True, timeout=60
        )
        return result.stdout

    def resize(self, columns: int) -> None:
        """Make the pane so wide."""
        self.run("resize-pane", "-t", "0.0", "-x", str(columns))

    def text(self) -> str:
        """All that was shown, lines that were wrapped by tmux joined again."""
        return self.run("capture-pane", "-p", "-J", "-S", "-", "-t", "0.0")

    def expect(self, text: str) -> str:
        """Wait until `text` is shown, but for breaks between words; all that was shown."""
        end = time.monotonic() + pty_terminal.PATIENCE_S
        while text not in " ".join((shown := self.text()).split()):
            assert time.monotonic() < end, f"no {text!r} in\n{shown}"
            time.sleep(0.05)
        return shown

    def enter(self, line: str) -> None:
        """Type `line`, and Enter."""
        self.run("send-keys", "-t", "0.0", "-l", line)
        self.run("send-keys", "-t", "0.0", "Enter")

    def close(self) -> None:
        """End the server with all that it runs."""
        self.run("kill-server")
        self._folder.cleanup()


@pytest.fixture
def pane(tmp_path: Path) -> Iterator[Pane]:
    if shutil.which("tmux") is None:
        assert "REQUIRE_PROGRAMS" not in os.environ, "install tmux"  # .ci/run does, and requires it
        pytest.skip("tmux is not installed")
    one = Pane(tmp_path, {"First": ANSWER}, 120)
    yield one
    one.close()


def test_an_answer_is_shown_once_while_the_pane_becomes_narrower(pane: Pane) -> None:
    pane.expect("/help lists the commands")
    pane.expect("0 of 2,048 tokens")
    pane.enter("First")
    pane.expect("A line")
    for columns, shown in (
        (70, "A line that goes on,"),
        (41, "words wrap in a narrow pane,"),
        (90, "of them, 6."),
    ):
        pane.resize(columns)
        pane.program.go()
        pane.expect(shown)
    for columns in range(85, 25, -7):  # as by dragging
        pane.resize(columns)
    pane.program.go()
    text = " ".join(pane.expect("The end.").split())
    for n in range(8):
        assert text.count(f"Paragraph {n} of the answer goes on with many words until") == 1
        assert text.count(f"with some more of them, {n}.") == 1
    for words in ("Heading", "A line that goes on, and on.", "cell one cell two", "The end."):
        assert text.count(words) == 1
    assert "**" not in text
    pane.expect("The end. > demo |")  # the next prompt


def test_a_progress_bar_stays_on_its_line(pane: Pane, tmp_path: Path) -> None:
    script = tmp_path / "bar.py"
    script.write_text(
        "from mlx_smolvlm.cli.output import ProgressBar\nimport os, time\n"
        "bar = ProgressBar()\n"
        "for n in range(12):\n"
        "    bar.draw(n, 12, f'{n} of 30 tiles read, {n} encoded, and more words about them')\n"
        "    time.sleep(0.11)\n"
        "bar.close()\nprint('done')\n"
    )
    command = shlex.join(["env", "PYTHONPATH=" + str(Path(__file__).parents[2]), sys.executable])
    pane.run("respawn-pane", "-k", "-t", "0.1", f"{command} {script}; cat")
    pane.resize(170)  # so that the other pane is narrow
    end = time.monotonic() + pty_terminal.PATIENCE_S
    while "done" not in (text := pane.run("capture-pane", "-p", "-S", "-", "-t", "0.1")):
        assert time.monotonic() < end, text
        time.sleep(0.05)
    assert text.count("[#") <= 1  # one from before it was narrow
