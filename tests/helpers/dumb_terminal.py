"""A process on a pseudo-terminal that shows text and moves no cursor."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


class Terminal:
    """A process on a terminal of its own; `text` is all that it has shown."""

    def __init__(
        self,
        *arguments: str,
        stdout: Path | None = None,
        env: Mapping[str, str] = os.environ,
        cwd: Path | None = None,
    ) -> None:
        self.text = ""
        self.fd, inner = pty.openpty()
        with contextlib.ExitStack() as stack:
            out = inner if stdout is None else stack.enter_context(stdout.open("wb"))
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=inner,
                stdout=out,
                stderr=inner,
                start_new_session=True,
                env={**env, "TERM": "dumb", "LC_ALL": "C.UTF-8"},
                cwd=cwd,
            )
        os.close(inner)

    def expect(self, pattern: str, timeout: float = 60) -> str:
        """What is shown up to the next match of `pattern`; later calls begin after it."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self.fd, 4096)
                except OSError:
                    data = b""
                assert data, f"it ended without {pattern!r}: {self.text!r}"
                self.text += data.decode(errors="replace")
        before, self.text = self.text[: match.end()], self.text[match.end() :]
        return before

    def send(self, text: str) -> None:
        """Type `text`."""
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        """Type Ctrl-C once the process waits for a line.

        Between showing a prompt and reading, Python would keep the signal until the next key.
        """
        stat = Path(f"/proc/{self.process.pid}/stat")
        end = time.monotonic() + 60
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, "it does not wait"
            time.sleep(0.01)
        self.send("\x03")

    def status(self) -> int:
        """Exit status, once it has left."""
        end = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not leave: {self.text!r}"
            if select.select([self.fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    self.text += os.read(self.fd, 4096).decode(errors="replace")
        return self.process.returncode

    def close(self) -> None:
        """End it if it still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
