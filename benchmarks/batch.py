"""Compare eight questions about eight pictures in one batch and one after the other.

    python -m benchmarks.batch [--folder FOLDER [--files FILES]] [--detail low|high]
        [--tokens N] [--rounds N] [--encoded | --length N] [--json]

With `--folder`, a checkpoint of SmolVLM2-256M's sizes with random weights, which is made there by
benchmarks/random_checkpoint.py (FILES as there), answers `--tokens` tokens of nonsense about
pictures of noise; otherwise the demo answers about the example pictures. Everything is computed
in float32, and nothing is reused. The two ways take turns in each round; the ratios are medians
over rounds, and the program fails unless all token ids are the same. `--encoded` gives each picture
random embeddings instead of encoding it, so that thirteen tiles (`--detail high`) take minutes
and not hours; decoding does the same work. `--length N` only times steps of eight rows and of one,
behind N tokens of random keys and values, by CPU time, which other programs disturb less; it is
meant for `OPENBLAS_NUM_THREADS=1`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from PIL import Image

from benchmarks.random_checkpoint import make_random_checkpoint
from mlx_smolvlm import Sampling, SmolVLM, load
from mlx_smolvlm.generate.batch import AnswerBatch, step_rows
from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.questions import BatchOptions, read_question
from mlx_smolvlm.generate.stream import AnswerStream
from mlx_smolvlm.kv.batched import BatchedKVCache
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.media.encode import Picture

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("chart", "four", "objects", "one", "page", "three", "two", "word")
QUESTION = "Describe this image."


class Run(NamedTuple):
    """One way to answer all questions: token ids of each answer, and what they took."""

    token_ids: list[list[int]]
    decoded: int  # tokens after the first of each answer
    decoding_s: float
    whole_s: float


def load_model(options: argparse.Namespace) -> SmolVLM:
    """Return the model in float32; one with random weights never ends an answer itself."""
    if options.folder is None:
        return load("demo", dtype="float32")
    vlm = load(make_random_checkpoint(options.folder, options.files), dtype="float32")
    config = replace(vlm.config, eos_token_ids=())
    return SmolVLM(Engine(vlm.path, config, vlm.model, vlm.engine.prompt_builder))


def make_prompts(vlm: SmolVLM, options: argparse.Namespace) -> list[Prompt]:
    """Return eight prompts about eight pictures."""
    random = np.random.default_rng(0)
    images: list[Image.Image]
    if options.folder is None:
        images = [Image.open(EXAMPLES / f"{name}.png") for name in NAMES]
    else:
        noise = random.integers(0, 255, (8, 768, 1024, 3), np.uint8)
        images = [Image.fromarray(pixels) for pixels in noise]
    shared = BatchOptions(Sampling(), detail=options.detail)
    prompts = [read_question(vlm.engine, (QUESTION, image), shared)[0] for image in images]
    if options.encoded:
        for prompt in prompts:
            for medium in prompt.media:
                assert isinstance(medium, Picture)
                shape = medium.num_tiles, vlm.config.image_seq_len, vlm.config.text.hidden_size
                medium.image_embeds = mx.array(random.normal(size=shape).astype(np.float32))
    return prompts


def answer_together(vlm: SmolVLM, prompts: list[Prompt], sampling: Sampling) -> Run:
    """Answer all prompts in one batch."""
    vlm.engine.memory.clear()
    began = time.perf_counter()
    batch = AnswerBatch(vlm.engine, max_rows=len(prompts), max_tokens=2**40)
    answers = [batch.add(prompt, sampling) for prompt in prompts]
    batch.fill()
    batch.step()  # takes the first token of each
    prepared, first = time.perf_counter(), sum(len(one.reply.token_ids) for one in answers)
    while batch.num_answers:
        batch.step()
    ended = time.perf_counter()
    token_ids = [answer.reply.token_ids for answer in answers]
    return Run(token_ids, sum(map(len, token_ids)) - first, ended - prepared, ended - began)


def answer_singly(vlm: SmolVLM, prompts: list[Prompt], sampling: Sampling) -> Run:
    """Answer the prompts one after the other."""
    began, token_ids, decoding_s = time.perf_counter(), [], 0.0
    for prompt in prompts:
        vlm.engine.memory.clear()
        reply = AnswerStream(vlm.engine, prompt, sampling).finish()
        token_ids.append(reply.token_ids)
        if reply.generation_tps:
            decoding_s += (reply.generation_tokens - 1) / reply.generation_tps
    decoded = sum(len(one) - 1 for one in token_ids)
    return Run(token_ids, decoded, decoding_s, time.perf_counter() - began)


def compare(vlm: SmolVLM, options: argparse.Namespace) -> dict[str, Any]:
    """Run both ways in turns, and return tokens per second and ratios, medians over the rounds."""
    sampling, speeds = Sampling(max_tokens=options.tokens), []
    for one in (Sampling(max_tokens=2), *options.rounds * [sampling]):  # the first warms up
        together = answer_together(vlm, make_prompts(vlm, options), one)
        singly = answer_singly(vlm, make_prompts(vlm, options), one)
        if together.token_ids != singly.token_ids:
            raise SystemExit("the batch has other token ids than single calls")
        speeds.append([_read_speeds(together), _read_speeds(singly)])
    result: dict[str, Any] = {}
    for column, name in enumerate(("decoding", "whole")):
        pairs = [(first[column], second[column]) for first, second in speeds[1:]]
        result[name] = {
            "batch_tps": median(first for first, _ in pairs),
            "single_tps": median(second for _, second in pairs),
            "ratio": median(first / second for first, second in pairs),
            "ratios": [round(first / second, 2) for first, second in pairs],
        }
    prompts = make_prompts(vlm, options)
    return {
        "model": vlm.config.source,
        "prompt_tokens": [int(prompt.input_ids.size) for prompt in prompts],
        "answer_tokens": [len(one) for one in together.token_ids],
        **result,
    }


def make_random_cache(vlm: SmolVLM, length: int) -> KVCache:
    """Return a cache of `length` tokens with random keys and values."""
    cache, text = vlm.model.make_cache(), vlm.config.text
    shape = 1, 2 * text.num_key_value_heads, length, text.head_dim
    for layer in range(text.num_hidden_layers):
        cache.buffers[layer] = (mx.random.normal(shape),)
    cache.offset = length
    mx.eval(cache.arrays)
    return cache


def compare_steps(vlm: SmolVLM, length: int, count: int) -> list[tuple[float, float]]:
    """Return the CPU seconds of `count` steps of eight rows, and of one, taken in turns."""
    single, rows = make_random_cache(vlm, length), BatchedKVCache(vlm.config.text.num_hidden_layers)
    for _ in range(8):
        rows.add(make_random_cache(vlm, length))
    seconds = []
    for _ in range(count + 1):
        began = time.process_time()
        mx.eval(step_rows(vlm.model, rows, mx.array([1] * 8)))
        between = time.process_time()
        mx.eval(vlm.model.step(mx.array([1]), single))
        seconds.append((between - began, time.process_time() - between))
    return seconds[1:]  # the first warms up


def _read_speeds(run: Run) -> tuple[float, float]:
    """Tokens per second of decoding, and of the whole."""
    total = sum(map(len, run.token_ids))
    return run.decoded / max(run.decoding_s, 1e-9), total / run.whole_s


def main() -> None:
    parser = argparse.ArgumentParser(description="Eight pictures in a batch and one by one.")
    parser.add_argument("--folder", type=Path, help="of the random checkpoint; the demo without")
    parser.add_argument("--files", type=Path, help="small files of SmolVLM2-256M")
    parser.add_argument("--detail", choices=("low", "high"), default="low")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoded", action="store_true", help="do not encode the pictures")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--length", type=int, help="only time steps behind so many tokens")
    options = parser.parse_args()
    if options.length is not None:
        seconds = compare_steps(load_model(options), options.length, 5 * options.rounds)
        eight, one = (1e3 * median(times) for times in zip(*seconds, strict=True))
        ratio = median(8 * single / batch for batch, single in seconds)
        print(f"a step behind {options.length} tokens: {eight:.1f} ms for eight rows, {one:.1f} ms")
        print(f"for one (CPU time, medians of {len(seconds)}); {ratio:.2f} times the tokens")
        return
    result = compare(load_model(options), options)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['model']}, 8 prompts of {result['prompt_tokens']} tokens,")
    print(f"answers of {result['answer_tokens']} tokens, the same ids both ways")
    print(f"{'tokens per second':18}{'batch':>10}{'one by one':>12}{'ratio':>8}  of each round")
    for name in ("decoding", "whole"):
        values = result[name]
        print(
            f"{name:18}{values['batch_tps']:>10.2f}{values['single_tps']:>12.2f}"
            f"{values['ratio']:>8.2f}  {values['ratios']}"
        )


if __name__ == "__main__":
    main()
