"""Measure other programs on a clip: frames, tiles, tokens, time and memory.

    python -m benchmarks.video_rivals {mlx-vlm,transformers} CLIP HF_FOLDER
                                      [--frames N] [--processor] [--json]

Run it with the Python of an environment with mlx-vlm (this package is not needed there), or with
this repository's after `make oracles`. Without torchvision, transformers uses the replacement in
tests/helpers/video_oracle.py, which resizes with Pillow and decodes with PyAV. CLIP and HF_FOLDER
are in the cache of benchmarks/video.py. --processor skips the model; --frames overrides the
program's number of frames.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPT = "What happens here?"

Row = dict[str, Any]


def measure_mlx_vlm(clip: str, folder: str, frames: int | None, processor_only: bool) -> Row:
    """Measure the steps of `python -m mlx_vlm generate --video CLIP`."""
    import mlx.core as mx
    from measure_mlx_vlm import load, stream_generate
    from measure_mlx_vlm.generate.video import resolve_video_inputs
    from measure_mlx_vlm.prompt_utils import apply_chat_template
    from measure_mlx_vlm.utils import VideoSampling, load_config, load_processor, prepare_inputs

    importlib.import_module("mlx_vlm.models.smolvlm")  # its processor instead of transformers'
    if processor_only:
        model, processor, config = None, load_processor(Path(folder), True), load_config(folder)
    else:
        model, processor = load(folder)
        mx.eval(model.parameters())
        config = model.config.to_dict()
    row: Row = {"before_mb": read_peak_mb()}
    started = time.perf_counter()
    sampling = VideoSampling(nframes=frames, frame_factor=1) if frames else VideoSampling()
    resolved = resolve_video_inputs(processor, [clip], sampling=sampling, max_frames=frames or 16)
    row["decode_s"] = time.perf_counter() - started
    prompt = apply_chat_template(processor, config, PROMPT, num_images=len(resolved.images))
    inputs = prepare_inputs(
        processor,
        images=resolved.images,
        videos=resolved.videos or None,
        prompts=prompt,
        image_token_index=config["image_token_id"],
    )
    mx.eval(inputs["input_ids"], inputs["pixel_values"])
    row["processor_s"] = time.perf_counter() - started - row["decode_s"]
    row["frames"] = len(resolved.images)
    row["tiles"] = inputs["pixel_values"].shape[0] * inputs["pixel_values"].shape[1]
    row["tokens"] = inputs["input_ids"].size
    if model is not None:
        at = time.perf_counter()
        next(stream_generate(model, processor, prompt, max_tokens=1, **inputs))
        row |= {"model_s": time.perf_counter() - at, "mlx_peak_mb": mx.get_peak_memory() / 1e6}
    return row | {"total_s": time.perf_counter() - started}


def measure_transformers(clip: str, folder: str, frames: int | None, processor_only: bool) -> Row:
    """Measure transformers' processor and model in float32, with an answer of one token."""
    import torch
    from measure_transformers import PreTrainedTokenizerFast, SmolVLMForConditionalGeneration

    from tests.helpers.video_oracle import VideoOracle

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    template = json.loads((Path(folder) / "chat_template.json").read_text(encoding="utf-8"))
    tokenizer.chat_template = template["chat_template"]
    processor = VideoOracle(folder, tokenizer, 64)
    processor.processor.chat_template = _add_videos(template["chat_template"])
    model = None
    if not processor_only:
        model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    row: Row = {"before_mb": read_peak_mb()}
    started = time.perf_counter()
    content = [{"type": "video"}, {"type": "text", "text": PROMPT}]
    sampling = {"num_frames": frames, "fps": 1000.0} if frames else {}
    inputs = processor([{"role": "user", "content": content}], [clip], **sampling)
    row["processor_s"] = time.perf_counter() - started
    row["frames"] = row["tiles"] = inputs["pixel_values"].shape[1]
    row["tokens"] = inputs["input_ids"].numel()
    if model is not None:
        at = time.perf_counter()
        with torch.no_grad():
            model.generate(
                input_ids=inputs["input_ids"],
                pixel_values=inputs["pixel_values"],
                max_new_tokens=1,
                do_sample=False,
            )
        row["model_s"] = time.perf_counter() - at
    return row | {"total_s": time.perf_counter() - started}


def _add_videos(template: str) -> str:
    """Add transformers' placeholder for videos to a chat template without one."""
    if "<video>" in template:
        return template
    image = "{% elif line['type'] == 'image' %}{{ '<image>' }}"
    return template.replace(image, image + image.replace("image", "video"))


def read_peak_mb() -> float:
    """Return the peak memory of this process, in 10**6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure other programs on a clip.")
    parser.add_argument("program", choices=["mlx-vlm", "transformers"])
    parser.add_argument("clip")
    parser.add_argument("folder", help="a Hugging Face checkpoint")
    parser.add_argument("--frames", type=int, help="instead of the program's own number")
    parser.add_argument("--processor", action="store_true", help="leave the model out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    measure = measure_mlx_vlm if options.program == "mlx-vlm" else measure_transformers
    row = measure(options.clip, options.folder, options.frames, options.processor)
    row["peak_mb"] = read_peak_mb()
    if options.json:
        print(json.dumps(row))
        return
    print("  ".join(f"{name} {round(value, 2)}" for name, value in row.items()))


if __name__ == "__main__":
    main()
