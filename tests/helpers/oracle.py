"""transformers' image and text processors, set up from the published files.

The published files are looked for in $SMOLVLM_REFERENCE, or in
../shared/reference beside the repository.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

ROOT = Path(__file__).parents[2]
REFERENCE = Path(os.environ.get("SMOLVLM_REFERENCE", ROOT.parent / "shared" / "reference"))

# name: (kind of processor, tokens per tile, <image>, vocabulary, folder of the chat template)
CHECKPOINTS: dict[str, tuple[str, int, int, int, str]] = {
    "SmolVLM-256M-Instruct": ("idefics3", 64, 49190, 49280, "SmolVLM-256M-Instruct"),
    "SmolVLM-500M-Instruct": ("idefics3", 64, 49190, 49280, "SmolVLM-500M-Instruct"),
    "SmolVLM-Instruct": ("idefics3", 81, 49153, 49155, "SmolVLM-256M-Instruct"),
    "SmolVLM2-256M-Video-Instruct": ("smolvlm", 64, 49190, 49280, "SmolVLM2-256M-Video-Instruct"),
    "SmolVLM2-500M-Video-Instruct": ("smolvlm", 64, 49190, 49280, "SmolVLM2-500M-Video-Instruct"),
    "SmolVLM2-2.2B-Instruct": ("smolvlm", 81, 49190, 49280, "SmolVLM2-2.2B-Instruct"),
    "SmolLM2-135M-Instruct": ("text", 64, 49190, 49152, "SmolLM2-135M-Instruct"),
}
IMAGE_PROCESSORS = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}

# Every picture of a prompt is cut into tiles of 8 pixels here, so that the text is quick to get.
SMALL = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 8}}


def image_processor(kind: str, tile: int, longest_edge: int, splitting: bool = True) -> Any:
    """transformers' PIL image processor, with the settings of a checkpoint."""
    return IMAGE_PROCESSORS[kind](
        size={"longest_edge": longest_edge},
        max_image_size={"longest_edge": tile},
        do_image_splitting=splitting,
        resample=Image.Resampling.LANCZOS,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        return_row_col_info=True,
    )


def processed(processor: Any, picture: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """`pixel_values` (N, H, W, 3) and (rows, cols) by transformers."""
    outputs = processor(images=[picture], return_tensors="np")
    pixel_values = outputs["pixel_values"][0].transpose(0, 2, 3, 1)
    return pixel_values, (int(outputs["rows"][0][0]), int(outputs["cols"][0][0]))


def tokenizer_json(name: str) -> Path:
    """The published tokenizer of a checkpoint, or its reconstruction."""
    folder = REFERENCE / "checkpoints" / name
    path = folder / "tokenizer.json"
    return path if path.exists() else folder / "tokenizer.reconstructed.json"


def chat_template(name: str) -> str:
    """The published chat template of a checkpoint."""
    folder = REFERENCE / "checkpoints" / CHECKPOINTS[name][4]
    path = folder / "chat_template.json"
    if not path.exists():
        path = folder / "tokenizer_config.json"
    template: str = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    return template


class Oracle:
    """Prompts of one checkpoint by transformers."""

    def __init__(self, name: str) -> None:
        self.kind, self.image_seq_len, *_ = CHECKPOINTS[name]
        folder, template = REFERENCE / "checkpoints" / name, chat_template(name)
        # Not AutoTokenizer: transformers 5 makes a GPT2Tokenizer of these folders, which drops
        # the Digits step of tokenizer.json, so that white space before a digit splits in
        # another way than in training (docs/decisions/prompts.md).
        if (folder / "tokenizer.json").exists():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json(name)))
        self.tokenizer = tokenizer
        self.processor: Any = None
        if self.kind == "idefics3":
            self.processor = Idefics3Processor(
                Idefics3ImageProcessorPil(**SMALL),
                tokenizer,
                image_seq_len=self.image_seq_len,
                chat_template=template,
            )
        elif self.kind == "smolvlm":
            self.processor = _SmolVLMProcessor(
                SmolVLMImageProcessorPil(**SMALL),
                tokenizer,
                SimpleNamespace(num_frames=64, fps=1),
                image_seq_len=self.image_seq_len,
                chat_template=template,
            )

    def input_ids(
        self, messages: list[dict[str, Any]], grids: list[tuple[int, int]], generation: bool
    ) -> list[int]:
        """`input_ids` of a conversation whose pictures are cut into `grids`."""
        if self.processor is None:
            texts = [
                {"role": m["role"], "content": "".join(item["text"] for item in m["content"])}
                for m in messages
            ]
            ids: list[int] = self.tokenizer.apply_chat_template(
                texts, add_generation_prompt=generation, return_dict=False
            )
            return ids
        text = self.processor.apply_chat_template(messages, add_generation_prompt=generation)
        if not grids:
            return list(self.processor(text=text)["input_ids"][0])
        return [int(i) for i in self._with_grids(text, grids)]

    def _with_grids(self, text: str, grids: list[tuple[int, int]]) -> Any:
        """Ids with image strings of `grids`, whatever the pictures' own grids would be."""
        rows, cols = [[row for row, _ in grids]], [[col for _, col in grids]]
        original = self.processor.image_processor._preprocess

        def preprocess(*args: Any, **kwargs: Any) -> Any:
            outputs = original(*args, **kwargs)
            outputs["rows"], outputs["cols"] = rows, cols
            return outputs

        self.processor.image_processor._preprocess = preprocess
        try:
            pictures = [Image.new("RGB", (8, 8)) for _ in grids]
            return self.processor(text=text, images=pictures)["input_ids"][0]
        finally:
            self.processor.image_processor._preprocess = original


class _SmolVLMProcessor(SmolVLMProcessor):
    """Without the check of the video processor's class, which needs torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        return None
