"""The entry point. It imports nothing that takes time, so that Ctrl-C is handled from the start.

Exit statuses: 0 is success, 1 an error, 2 a wrong option, 130 Ctrl-C, 141 a closed stdout.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

INTERRUPTED = 130


def main() -> None:
    """Run the command in `sys.argv`; leaves by SystemExit."""
    with _exit_on_interrupt():
        from mlx_smolvlm.tuning import apply_settings

        apply_settings()  # before MLX is imported
        from mlx_smolvlm.cli.command_table import run_command
    try:
        status = run_command()
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)


@contextlib.contextmanager
def _exit_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once within the block.

    An import that is interrupted by an exception may print a traceback and go on, or raise
    another error than KeyboardInterrupt. Where Ctrl-C is ignored (nohup), it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
