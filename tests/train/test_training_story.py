"""A user's story: labelled pictures in folders, a file of settings, a training, better answers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_smolvlm import load

QUESTION = "How do the stripes run?"
LABELS = ("across", "upright")
COMMAND = [sys.executable, "-m", "mlx_smolvlm.cli.app"]

SETTINGS = """
model = "demo"
epochs = 3
batch_size = 8
detail = "low"
parts = ["text", "connector"]
[optimizer]
rate = 3e-3
warmup = 5
[[data]]
path = "photos"
"""


def stripes(label: str, seed: int) -> Image.Image:
    """A picture of stripes of two colours, some of them more than one pixel apart in tone."""
    rng = np.random.default_rng(seed)
    width = int(rng.integers(4, 12))
    colors = rng.integers(0, 255, (2, 3))
    colors[1] = (colors[0] + 128) % 256
    rows = colors[(np.arange(96) + int(rng.integers(width))) // width % 2]  # (96, 3)
    pixels = np.repeat(rows[:, None], 96, 1)
    pixels = pixels if label == "across" else pixels.swapaxes(0, 1)
    noisy = pixels + rng.normal(0, 12, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/across and photos/upright, 100 pictures each, and the lines that docs/fine-tuning.md
    makes of them."""
    folder = tmp_path_factory.mktemp("story")
    for number in range(200):
        label = LABELS[number % 2]
        path = folder / "photos" / label / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        stripes(label, number).save(path)
    lines: dict[str, list[str]] = {"train": [], "valid": []}
    for number, path in enumerate(sorted((folder / "photos").glob("*/*.png"))):
        label = path.parent.name
        answer = f"{label.capitalize()}."
        line = {"image": f"{label}/{path.name}", "question": QUESTION, "answer": answer}
        lines["train" if number % 5 else "valid"].append(json.dumps(line))
    for split, rows in lines.items():
        (folder / "photos" / f"{split}.jsonl").write_text("\n".join(rows))
    (folder / "photos.toml").write_text(SETTINGS)
    return folder


def right(folder: Path, adapter: Path | None) -> float:
    """Share of the held-out pictures that are answered to the letter."""
    vlm = load("demo", adapter=adapter)
    lines = list(map(json.loads, (folder / "photos" / "valid.jsonl").read_text().splitlines()))
    said = [
        vlm.ask(line["question"], images=[folder / "photos" / line["image"]], detail="low").text
        for line in lines
    ]
    return float(np.mean([text == line["answer"] for text, line in zip(said, lines, strict=True)]))


def test_the_demo_learns_what_it_did_not_know(folder: Path) -> None:
    assert right(folder, None) == 0.0
    done = subprocess.run(
        [*COMMAND, "train", folder / "photos.toml"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    adapter = Path(done.stdout.strip())
    assert adapter == folder / "photos-trained" / "adapter"
    assert right(folder, adapter) > 0.9
    picture = folder / "new.png"
    stripes("upright", 1000).save(picture)
    asked = ["chat", QUESTION, "-i", picture, "--detail", "low", "--adapter", adapter]
    answer = subprocess.run([*COMMAND, *asked], capture_output=True, text=True, timeout=60)
    assert answer.stdout == "Upright.\n"
