"""The program that is measured: this package in a process of its own.

    python -m mlx_smolvlm.bench.worker FOLDER [MEMORY_LIMIT]

It reads requests, one JSON object a line, from stdin, and answers each with a line on stdout;
`bench/peer.py` answers the same requests for other programs. Everything that was requested is
computed before the answer is written.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before the imports that are measured

import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    import PIL.Image

    from mlx_smolvlm.media.tiles import Detail
    from mlx_smolvlm.model.model import Model

SEED = 0


class Worker:
    """This package with a loaded model."""

    def __init__(self, folder: str, memory_limit: int | None = None) -> None:
        import mlx_smolvlm

        load = mlx_smolvlm.load  # imports MLX
        imported = time.perf_counter()
        self.vlm = load(Path(folder), memory_limit=memory_limit)
        self._plain: Model | None = None  # for `build_graph`
        now = time.perf_counter()
        self.ready = {"import_s": imported - STARTED, "load_s": now - imported}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what `request` asks for, and return the result."""
        methods: dict[str, Callable[..., dict[str, Any]]] = {
            "preprocess": self.preprocess,
            "vision": self.encode,
            "text": self.generate,
            "turns": self.take_turns,
            "graph": self.build_graph,
            "memory": self.measure_memory,
        }
        options = {key: value for key, value in request.items() if key != "do"}
        return methods[request["do"]](**options)

    def preprocess(self, width: int, height: int, detail: Detail, seed: int) -> dict[str, Any]:
        """Time the cutting of a decoded picture into tiles."""
        from mlx_smolvlm.media.tiles import tile_picture

        picture = make_picture(width, height, seed)
        started = time.perf_counter()
        tiles = tile_picture(picture, self.vlm.config, detail)
        return {"seconds": time.perf_counter() - started, "tiles": tiles.grid.num_tiles}

    def encode(self, tiles: int, side: int) -> dict[str, Any]:
        """Time the encoder and the connector, with as many tiles at a time as in an answer."""
        import mlx.core as mx

        pixel_values, batch = make_pixels(tiles, side), self.vlm.engine.tile_batch
        started = time.perf_counter()
        parts = []
        for start in range(0, tiles, batch):
            parts.append(self.vlm.engine.encoder(mx.array(pixel_values[start : start + batch])))
            mx.eval(parts[-1])
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "sample": parts[0][0, 0, :8].astype(mx.float32).tolist()}

    def generate(self, prompt: int, tokens: int) -> dict[str, Any]:
        """Time the prefill of `prompt` tokens, and the generation of `tokens` after the first."""
        import mlx.core as mx

        from mlx_smolvlm.generate.loop import generate_tokens
        from mlx_smolvlm.generate.sampling import Sampling, make_sampler

        model, ids = self.vlm.model, make_ids(prompt)
        sampler, cache = make_sampler(Sampling()), model.make_cache()
        started = time.perf_counter()
        stream = generate_tokens(model, model.embed(ids), cache, sampler, tokens + 1)
        generated = [next(stream)]
        first = time.perf_counter()
        generated += stream
        last = time.perf_counter()
        mx.eval(cache.arrays)
        return {"prefill_s": first - started, "decode_s": last - first, "ids": generated}

    def take_turns(
        self, width: int, height: int, detail: Detail, seed: int, tokens: int
    ) -> dict[str, Any]:
        """Time the first tokens of two turns about a picture that was not seen before."""
        picture = make_picture(width, height, seed)
        chat = self.vlm.chat(detail=detail, max_tokens=tokens)
        times, encoded = [], []
        for question, images in (("What is in this picture?", [picture]), ("Which color?", [])):
            reply = chat.ask(question, images)
            times.append(reply.time_to_first_token_s)
            encoded.append(reply.encoded_tiles)
        return {"first_s": times[0], "second_s": times[1], "encoded": encoded}

    def build_graph(self, prompt: int, repeat: int) -> dict[str, Any]:
        """Measure the processor time of building the graph of a decoding step, not computing it."""
        import mlx.core as mx

        from mlx_smolvlm.checkpoint.load import load_model

        if self._plain is None:  # in MLX, also where `load` uses NumPy
            self._plain = load_model(self.vlm.path, "float32")
        model = self._plain
        cache, token_id = model.make_cache(), mx.array([5])
        mx.eval(model(model.embed(make_ids(prompt)), cache), cache.arrays, token_id)
        times = []
        for _ in range(repeat):
            copy = cache.fork()
            started = time.thread_time()
            following = mx.argmax(model.step(token_id, copy), keepdims=True)
            times.append(time.thread_time() - started)
            del following
        return {"seconds": times}

    def measure_memory(self) -> dict[str, Any]:
        """Measure the peaks so far: of the process, and of what MLX allocated."""
        import mlx.core as mx

        return {"resident": read_peak_memory(), "mlx": mx.get_peak_memory()}


def read_peak_memory() -> int:
    """Return the most memory that this process ever had in use, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def make_picture(width: int, height: int, seed: int) -> PIL.Image.Image:
    """Return a picture of noise."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    small = Image.fromarray(noise.astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def make_pixels(tiles: int, side: int) -> Any:
    """Return random `pixel_values`, float32 (N, H, W, 3) from -1 to 1."""
    import numpy as np

    return np.random.default_rng(SEED).random((tiles, side, side, 3), np.float32) * 2 - 1


def make_ids(length: int) -> Any:
    """Return random token ids that no checkpoint uses for pictures, int32 (L,)."""
    import numpy as np

    return np.random.default_rng(SEED).integers(3, 900, length).astype(np.int32)


def main() -> None:
    """Load the model in `sys.argv`, then answer requests until stdin ends."""
    from mlx_smolvlm.bench.peer import serve

    serve(lambda: Worker(sys.argv[1], *map(int, sys.argv[2:])))


if __name__ == "__main__":
    main()
