"""Write tests/golden/network.json.gz: what transformers gives for tests/network_cases.py.

python -m tests.reference.make_model_goldens
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration

from tests.helpers import network_cases as cases
from tests.helpers import recorder

TESTS = Path(__file__).parents[1]


def record(name: str, folder: Path) -> dict[str, Any]:
    """Sampled stages and greedy ids of one case."""
    source = cases.make(folder / name, name)
    idefics3 = cases.CASES[name]["model_type"] == "idefics3"
    kind = Idefics3ForConditionalGeneration if idefics3 else SmolVLMForConditionalGeneration
    model = kind.from_pretrained(source, dtype=torch.float32).eval()
    pixel_values, input_ids = cases.inputs(name)
    inputs = {
        "pixel_values": torch.from_numpy(pixel_values).permute(0, 3, 1, 2)[None],
        "input_ids": torch.from_numpy(input_ids)[None],
    }
    with torch.no_grad(), recorder.recorded(model) as seen:
        seen["logits"] = model(**inputs).logits
    with torch.no_grad():
        answer = model.generate(
            **inputs,
            max_new_tokens=cases.NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    order = ["patch embedding"]
    order += [key for key in seen if key.startswith("encoder layer")]
    order += ["post_layernorm", "connector", "merged embeddings"]
    order += [key for key in seen if key.startswith("decoder layer")]
    order += ["norm", "logits"]
    stages = {key: cases.sample(seen[key].numpy()) for key in order}
    return {"stages": stages, "token_ids": answer[0, input_ids.size :].tolist()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        golden = {name: record(name, Path(folder)) for name in cases.CASES}
    data = json.dumps(golden).encode()
    path = TESTS / "golden" / "network.json.gz"
    path.write_bytes(gzip.compress(data, mtime=0))
    print(f"{path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
