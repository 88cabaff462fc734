"""Other programs, measured in their own interpreter: mlx-vlm, mlx-lm and transformers.

    PYTHON peer.py NAME FOLDER

A script, not a module: the interpreter need not have this package. Requests and answers are those
of `bench/worker.py`. Models are driven as each program's own generation drives them, with
what would only cost time left out (log-probabilities, progress bars, text):

- mlx-vlm: the vision model with the mask that its `get_input_embeddings` makes, and the connector;
  all tokens of the prompt but the last in chunks of 2,048 without the head, as in `generate_step`.
- mlx-lm: the decoder of the checkpoint as a Llama; `generate_step` for the rest.
- transformers: `get_image_features`, and the decoder with a `DynamicCache`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
CHUNK = 2048  # tokens; the default of mlx-vlm and mlx-lm
SEED = 0


class MlxVlm:
    """mlx-vlm with a model in Hugging Face's format."""

    def __init__(self, folder: Path) -> None:
        load_model = importlib.import_module("mlx_vlm.utils").load_model
        self.caches = importlib.import_module("mlx_vlm.models.cache")
        self.mx = importlib.import_module("mlx.core")
        self.model = load_model(folder)
        self.decoder = self.model.language_model

    def encode(self, pixel_values: Any) -> Any:
        """Start the encoder and the connector on `pixel_values` (N, H, W, 3)."""
        mx, config = self.mx, self.model.config.vision_config
        side = config.image_size // config.patch_size
        mask = mx.ones((len(pixel_values), side, side), mx.bool_)
        features, *_ = self.model.vision_model(
            mx.array(pixel_values), patch_attention_mask=mask, output_hidden_states=True
        )
        features = self.model.connector(features)
        mx.eval(features)
        return features

    def make_cache(self) -> Any:
        """Return an empty cache."""
        return self.caches.make_prompt_cache(self.decoder)

    def embed(self, ids: Any) -> Any:
        """Embed `ids` (1, L)."""
        return self.decoder.embed_tokens(ids)

    def run(self, ids: Any, embeds: Any, cache: Any) -> Any:
        """Return the logits (1, L, vocabulary) of `ids` or `embeds`."""
        return self.decoder(ids, inputs_embeds=embeds, cache=cache).logits

    def generate(self, ids: Any, tokens: int) -> tuple[float, float, list[int]]:
        """Return the seconds of prefill and of decoding, and the ids."""
        mx = self.mx
        cache = self.make_cache()
        started = time.perf_counter()
        prompt = mx.array(ids)[None]
        embeds = self.embed(prompt)
        while prompt.shape[1] > 1:
            count = min(CHUNK, prompt.shape[1] - 1)
            self.run(prompt[:, :count], embeds[:, :count], cache)
            mx.eval([one.state for one in cache])
            prompt, embeds = prompt[:, count:], embeds[:, count:]
        token = mx.argmax(self.run(prompt, embeds, cache)[:, -1], axis=-1)
        mx.async_eval(token)
        generated, first = [], 0.0
        for number in range(tokens + 1):
            if number < tokens:
                following = mx.argmax(self.run(token[None], None, cache)[:, -1], axis=-1)
                mx.async_eval(following)
            generated.append(token.item())
            first = first or time.perf_counter()
            token = following
        return first - started, time.perf_counter() - first, generated

    def build_graph(self, ids: Any, repeat: int) -> list[float]:
        """Return the processor time of building the graph of a decoding step, `repeat` times."""
        mx, cache = self.mx, self.make_cache()
        prompt = mx.array(ids)[None]
        mx.eval(self.run(prompt, None, cache), [one.state for one in cache])
        token, times = mx.array([[5]]), []
        filled = [(one.keys[:], one.values[:], one.offset) for one in cache]
        mx.eval([(keys, values) for keys, values, _ in filled])
        for _ in range(repeat):
            for one, (keys, values, offset) in zip(cache, filled, strict=True):
                one.keys, one.values, one.offset = keys[:], values[:], offset
            started = time.thread_time()
            following = mx.argmax(self.run(token, None, cache)[:, -1], axis=-1)
            times.append(time.thread_time() - started)
            del following
        return times


class MlxLm(MlxVlm):
    """mlx-lm with the decoder of a model in Hugging Face's format, as a Llama."""

    def __init__(self, folder: Path) -> None:
        utils = importlib.import_module("mlx_lm.utils")
        llama: Any = importlib.import_module("mlx_lm.models.llama")
        self.caches = importlib.import_module("mlx_lm.models.cache")
        self.mx = importlib.import_module("mlx.core")
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))

        class Decoder(llama.Model):  # type: ignore[misc,name-defined]  # of the version there
            def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
                start = "model.text_model."
                names = {name: name.replace(start, "model.") for name in weights}
                used = {
                    new: weights[name]
                    for name, new in names.items()
                    if name.startswith((start, "lm_head."))
                }
                return dict(super().sanitize(used))

        text = {**settings["text_config"], "model_type": "llama"}
        text["tie_word_embeddings"] = settings.get("tie_word_embeddings", False)
        self.model, _ = utils.load_model(
            folder,
            model_config=text,
            get_model_classes=lambda config: (Decoder, llama.ModelArgs),
        )
        self.decoder = self.model

    def encode(self, pixel_values: Any) -> Any:
        """Raise: mlx-lm has no vision."""
        raise NotImplementedError("mlx-lm reads no pictures")

    def embed(self, ids: Any) -> Any:
        """Embed `ids` (1, L)."""
        return self.decoder.model.embed_tokens(ids)

    def run(self, ids: Any, embeds: Any, cache: Any) -> Any:
        """Return the logits (1, L, vocabulary) of `ids`."""
        return self.decoder(ids, cache=cache)


class Transformers:
    """transformers with torch, in the checkpoint's own type."""

    def __init__(self, folder: Path) -> None:
        self.torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        self.cache_class = transformers.DynamicCache
        self.device = "mps" if self.torch.backends.mps.is_available() else "cpu"
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        self.model = model.to(self.device).eval()

    def encode(self, pixel_values: Any) -> Any:
        """Run the encoder and the connector on `pixel_values` (N, H, W, 3)."""
        torch, model = self.torch, self.model
        with torch.inference_mode():
            pixels = torch.from_numpy(pixel_values).permute(0, 3, 1, 2)[None]
            pixels = pixels.to(self.device, model.dtype)
            features = model.model.get_image_features(pixels)
            features = getattr(features, "pooler_output", features)
            if isinstance(features, (list, tuple)):
                features = torch.cat(list(features))
            self._wait()
        return features

    def generate(self, ids: Any, tokens: int) -> tuple[float, float, list[int]]:
        """Return the seconds of prefill and of decoding, and the ids."""
        torch, model = self.torch, self.model
        cache = self.cache_class()
        with torch.inference_mode():
            started = time.perf_counter()
            token = torch.tensor(ids, dtype=torch.long, device=self.device)[None]
            generated, first = [], 0.0
            for _ in range(tokens + 1):
                states = model.model.text_model(token, past_key_values=cache, use_cache=True)
                token = model.lm_head(states.last_hidden_state[:, -1:]).argmax(-1)
                generated.append(token.item())
                first = first or time.perf_counter()
            return first - started, time.perf_counter() - first, generated

    def _wait(self) -> None:
        """Wait until the device has computed everything."""
        if self.device == "mps":
            self.torch.mps.synchronize()


PEERS = {"mlx-vlm": MlxVlm, "transformers": Transformers, "mlx-lm": MlxLm}


class Peer:
    """Answers requests about one of `PEERS`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.numpy = importlib.import_module("numpy")
        self.program: Any = PEERS[name](folder)
        metadata = importlib.import_module("importlib.metadata")
        self.ready = {
            "version": metadata.version(name),
            "start_s": time.perf_counter() - STARTED,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what `request` asks for, and return the result."""
        random = self.numpy.random.default_rng(SEED)
        if request["do"] == "vision":
            side = request["side"]
            shape = (request["tiles"], side, side, 3)
            pixel_values = random.random(shape, self.numpy.float32) * 2 - 1
            started = time.perf_counter()
            features = self.program.encode(pixel_values)
            seconds = time.perf_counter() - started
            sample = features.reshape(-1, features.shape[-1])[0, :8].tolist()
            return {"seconds": seconds, "sample": sample}
        ids = random.integers(3, 900, request["prompt"]).astype(self.numpy.int32)
        if request["do"] == "graph":
            return {"seconds": self.program.build_graph(ids, request["repeat"])}
        prefill_s, decode_s, generated = self.program.generate(ids, request["tokens"])
        return {"prefill_s": prefill_s, "decode_s": decode_s, "ids": generated}


def serve(make: Callable[[], Any]) -> None:
    """Make a program, say that it is ready, and answer each line of stdin with one on stdout."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed goes to stderr

    def reply(compute: Callable[[], dict[str, Any]]) -> None:
        try:
            result = compute()
        except Exception as error:  # of another program: anything
            result = {"error": f"{type(error).__name__}: {error}"}
        output.write(json.dumps(result) + "\n")
        output.flush()

    programs: list[Any] = []

    def start() -> dict[str, Any]:
        programs.append(make())
        ready: dict[str, Any] = programs[0].ready
        return ready

    reply(start)
    for line in sys.stdin:
        request = json.loads(line)
        reply(lambda: programs[0].answer(request))  # noqa: B023 (called at once)


if __name__ == "__main__":
    serve(lambda: Peer(sys.argv[1], Path(sys.argv[2])))
