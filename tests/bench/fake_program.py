"""A program for `bench` that answers at once: FAKE NAME LOG [BROKEN].

Its figures are the same on every run. It appends its name to LOG for each request.
"""

import os
import runpy
import sys
from pathlib import Path

serve = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "peer.py"))["serve"]
NAME, LOG = sys.argv[1], Path(sys.argv[2])
ANSWERS = {
    "turns": {"first_s": 0.5, "second_s": 0.25, "encoded": [1, 0]},
    "preprocess": {"seconds": 0.125, "tiles": 1},
    "memory": {"resident": 2_000_000, "mlx": 1_000_000},
}
SPEED = {"mlx-smolvlm": 2.0}.get(NAME, 1.0)


class Fake:
    """Answers with constants; this package is twice as fast as others."""

    ready = {"import_s": 0.5, "load_s": 1.5, "version": "9.9"}  # noqa: RUF012

    def answer(self, request):  # type: ignore[no-untyped-def]
        """Return the constants."""
        if "broken" in sys.argv:
            raise ValueError("no such kernel")
        if "quits" in sys.argv:
            os._exit(4)
        with LOG.open("a") as file:
            file.write(f"{NAME} {request['do']}\n")
        if request["do"] == "vision":
            return {"seconds": request["tiles"] / SPEED, "sample": [1.0, -0.5]}
        if request["do"] == "text":
            seconds = {"prefill_s": 4 / SPEED, "decode_s": 8 / SPEED}
            return {**seconds, "ids": [7] * request["tokens"] + [len(NAME)]}
        return ANSWERS[request["do"]]


if "lacks" in sys.argv:
    serve(lambda: __import__("mlx_vlm_that_nobody_has"))
if "dies" in sys.argv:
    sys.exit(3)
serve(Fake)
