"""Convert, load and ask every published checkpoint at full size, with random weights.

    python -m benchmarks.family [--only NAME]... [--files FOLDER] [--work FOLDER] [--precision P]...
                                [--detail low|high] [--no-answer]

Names and shapes of the tensors are the published ones (tests/golden/checkpoint_keys.json), in the
published dtype. FOLDER has a folder for each checkpoint with its small files (tokenizer.json,
chat_template.json, preprocessor_config.json, ...); missing files are made, which changes the size
on disk only by the tokenizer's 3.5 MB. Weights are written tensor by tensor into --work and deleted
afterwards: 9 GB for 2.2B in float32.

Each step runs in its own process, and its peak resident memory is reported. On a CPU the answer is
computed with float32 activations and each matrix is unpacked for its product, because MLX's
packed products are many times slower there; a GPU needs less.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent
KEYS = ROOT / "tests" / "golden" / "checkpoint_keys.json"
TEMPLATE = ROOT / "mlx_smolvlm" / "demo" / "chat_template.jinja"
PICTURE = ROOT / "examples" / "three.png"
SHARD_BYTES = 5 * 10**9  # the limit of transformers
ITEM_BYTES = {"F32": 4, "BF16": 2}
SPECIAL = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>")


@dataclass(frozen=True)
class Published:
    """The entry of the golden file with the names and shapes of a checkpoint, and its dtype."""

    keys: str
    dtype: str


CHECKPOINTS = {
    "SmolVLM-256M-Instruct": Published("SmolVLM-256M-Instruct", "BF16"),
    "SmolVLM2-256M-Video-Instruct": Published("SmolVLM-256M-Instruct", "F32"),
    "SmolDocling-256M-preview": Published("SmolVLM-256M-Instruct", "BF16"),
    "granite-docling-258M": Published("granite-docling-258M", "BF16"),
    "SmolVLM-500M-Instruct": Published("SmolVLM-500M-Instruct", "BF16"),
    "SmolVLM2-500M-Video-Instruct": Published("SmolVLM-500M-Instruct", "F32"),
    "SmolVLM-Instruct": Published("SmolVLM-Instruct", "BF16"),
    "SmolVLM2-2.2B-Instruct": Published("SmolVLM2-2.2B-Instruct", "F32"),
}

# Options of `mlx-smolvlm convert`.
PRECISIONS: dict[str, dict[str, Any]] = {
    "16": {"dtype": "bfloat16"},
    "4": {"bits": 4},
    "4, embeddings 4": {"bits": 4, "embeddings_bits": 4},
    "4, embeddings 4, bfloat16": {"bits": 4, "embeddings_bits": 4, "dtype": "bfloat16"},
}


def list_tensor_shapes(keys: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by name; `keys` has one pattern for all layers."""
    shapes = {}
    for pattern, shape in keys["tensors"].items():
        part = "vision_config" if "vision_model" in pattern else "text_config"
        for layer in range(keys["config"][part]["num_hidden_layers"] if "*" in pattern else 1):
            shapes[pattern.replace("*", str(layer))] = tuple(shape)
    return shapes


def count_numbers(shape: tuple[int, ...]) -> int:
    """Return the number of elements of an array of `shape`."""
    size = 1
    for side in shape:
        size *= side
    return size


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Write random tensors of `dtype` to the safetensors file `path`, one at a time."""
    import numpy as np

    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + count_numbers(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    random = np.random.default_rng(len(shapes))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = random.random(count_numbers(shape), dtype=np.float32)
            values -= 0.5
            values *= 0.1
            if dtype == "BF16":  # the upper half of a float32
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
            else:
                file.write(values.data)


def write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Write the random weights of a checkpoint, in shards like those of transformers."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = count_numbers(shape) * ITEM_BYTES[dtype]
        if size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    if len(shards) == 1:
        write_shard(folder / "model.safetensors", shards[0], dtype)
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, shard, dtype)
        index |= dict.fromkeys(shard, name)
    values = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))


def make_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json of bytes and special tokens, with the image token of `config`."""
    from tokenizers import pre_tokenizers

    image = config["image_token_id"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters, 10)}
    special = {"<image>": image, **{text: n for n, text in enumerate(SPECIAL, 1)}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": text, "special": True, **flags}
            for text, number in sorted(special.items(), key=lambda item: item[1])
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                          "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                    "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary | special, "merges": []},
    }  # fmt: skip


def write_small_files(folder: Path, config: dict[str, Any], files: Path | None) -> list[str]:
    """Write all files but the weights, and return the names of those that were made."""
    tile = config["vision_config"]["image_size"]
    made: dict[str, Any] = {
        "config.json": config,
        "tokenizer.json": make_tokenizer(config),
        "chat_template.json": {"chat_template": TEMPLATE.read_text(encoding="utf-8")},
        "generation_config.json": {"eos_token_id": config["text_config"]["eos_token_id"]},
        "preprocessor_config.json": {
            "size": {"longest_edge": 4 * tile},
            "max_image_size": {"longest_edge": tile},
        },
    }
    for name in list(made):
        stem, _, ending = name.partition(".")
        for found in (name, f"{stem}.reconstructed.{ending}"):
            if files is not None and name != "config.json" and (files / found).is_file():
                shutil.copyfile(files / found, folder / name)
                made.pop(name, None)
    for name, values in made.items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return sorted(set(made) - {"config.json"})


def read_peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def write_source(name: str, keys: Path, folder: Path, files: Path | None) -> dict[str, Any]:
    """Write the source, and return its number of weights, the made files and peak memory."""
    published = CHECKPOINTS[name]
    values = json.loads(keys.read_text(encoding="utf-8"))[published.keys]
    shapes = list_tensor_shapes(values)
    write_weights(folder, shapes, published.dtype)
    own = None if files is None else files / name
    return {
        "parameters": sum(map(count_numbers, shapes.values())),
        "made": write_small_files(folder, values["config"], own),
        "peak": read_peak_bytes(),
    }


def convert_source(source: Path, dest: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Convert, and return peak memory, seconds, and the bytes of weights and folder."""
    from mlx_smolvlm.convert.options import ConvertOptions
    from mlx_smolvlm.convert.run import convert_checkpoint

    began = time.perf_counter()
    convert_checkpoint(source, dest, ConvertOptions(**options))
    return {
        "peak": read_peak_bytes(),
        "seconds": time.perf_counter() - began,
        "weights": sum(path.stat().st_size for path in dest.glob("*.safetensors")),
        "disk": sum(path.stat().st_size for path in dest.iterdir()),
    }


def answer_once(folder: Path, detail: Literal["high", "low"]) -> dict[str, Any]:
    """Load, answer one token about a picture, and return peak memory and seconds."""
    from mlx_smolvlm import Sampling
    from mlx_smolvlm.convert.open_model import FolderReader

    began = time.perf_counter()
    vlm = FolderReader(folder).load()
    loaded = time.perf_counter() - began
    sampling = Sampling(max_tokens=1)
    reply = vlm.ask("What is this?", images=[PICTURE], sampling=sampling, detail=detail)
    return {
        "peak": read_peak_bytes(),
        "load_s": loaded,
        "answer_s": time.perf_counter() - began - loaded,
        "tiles": reply.encoded_tiles,
        "tokens": reply.generation_tokens,
    }


def run_step(*arguments: object) -> dict[str, Any]:
    """Run a step in its own process, and return its result."""
    command = [sys.executable, __file__, "--step", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} failed with {done.returncode}, see above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_named_step(arguments: list[str]) -> dict[str, Any]:
    """Run the step that `arguments` name, and return its result."""
    kind, *rest = arguments
    if kind == "write":
        name, keys, folder, files = rest
        return write_source(name, Path(keys), Path(folder), Path(files) if files else None)
    if kind == "convert":
        return convert_source(Path(rest[0]), Path(rest[1]), json.loads(rest[2]))
    return answer_once(Path(rest[0]), "high" if rest[1] == "high" else "low")


def measure(name: str, options: argparse.Namespace) -> None:
    """Print a line of the table for each precision of the checkpoint `name`."""
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        source = Path(work) / name
        source.mkdir()
        written = run_step("write", name, options.keys, source, options.files or "")
        print(f"{name}: made {', '.join(written['made']) or 'nothing'}", file=sys.stderr)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        for precision in options.precision:
            dest = Path(work) / "converted"
            made = run_step("convert", source, dest, json.dumps(PRECISIONS[precision]))
            asked = {"peak": 0} if options.no_answer else run_step("answer", dest, options.detail)
            print(f"{name}, {precision}: {made} {asked}", file=sys.stderr)
            shutil.rmtree(dest)
            bits = 8 * made["weights"] / written["parameters"]
            answer = f"{asked['peak'] / 1e6:,.0f}" if asked["peak"] else "-"
            numbers = (f"{size / 1e6:,.0f}", precision, f"{made['disk'] / 1e6:,.0f}")
            peaks = (f"{bits:.2f}", f"{made['peak'] / 1e6:,.0f}", answer)
            print(f"| {' | '.join((name, *numbers, *peaks))} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--step"]:
        print(json.dumps(run_named_step(sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description="Convert and ask every checkpoint at full size.")
    parser.add_argument("--only", action="append", choices=CHECKPOINTS, metavar="NAME")
    parser.add_argument("--keys", type=Path, default=KEYS, help="names and shapes")
    parser.add_argument("--files", type=Path, help="a folder of small files for each checkpoint")
    parser.add_argument("--work", type=Path, help="folder for temporary weights")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--detail", choices=("low", "high"), default="low", help="of the picture")
    parser.add_argument("--no-answer", action="store_true", help="only convert")
    options = parser.parse_args()
    options.precision = options.precision or list(PRECISIONS)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    print("| checkpoint | source MB | bits | on disk MB | bits per weight | conversion peak MB |"
          " answer peak MB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.only or CHECKPOINTS:
        measure(name, options)


if __name__ == "__main__":
    main()
