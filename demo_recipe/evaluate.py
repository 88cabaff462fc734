"""Held-out questions as tests and benchmarks ask them, and what a checkpoint answers.

    found = shares(vlm, cases("shapes", 40, families={"color", "where"}))

The questions are those of `heldout.py`, which writes all of them as a dataset.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from demo_recipe.clips import Clip
from demo_recipe.film import write_mp4
from demo_recipe.heldout import collect
from mlx_smolvlm import Reply, Sampling, SmolVLM
from mlx_smolvlm.media.tiles import Detail

LONGEST = Sampling(max_tokens=256)  # as `mlx-smolvlm eval` has it


@dataclass(frozen=True)
class HeldoutCase:
    """A conversation that ends with a question, and the answer that is expected.

    Attributes:
        messages: As `SmolVLM.ask` takes them, media items without a source.
    """

    family: str
    messages: list[dict[str, Any]]
    answer: str
    pictures: tuple[Image.Image, ...] = ()
    clip: Clip | None = None

    @property
    def question(self) -> str:
        """The text of the last question."""
        content = self.messages[-1]["content"]
        return "".join(item["text"] for item in content if item["type"] == "text")


def make_cases(
    topic: str, count: int, seed: int = 0, families: Collection[str] | None = None
) -> Iterator[HeldoutCase]:
    """Up to `count` cases of every family of `topic`, one of `heldout.ALL_TOPICS`.

    Args:
        families: Only these; None is all.
    """
    for item in collect(topic, count, seed, families):
        pictures = tuple(drawn.picture for drawn in item.pictures)
        yield HeldoutCase(item.task, item.messages[:-1], item.answer, pictures, item.clip)


@contextmanager
def make_media_items(
    pictures: Iterable[Image.Image], clip: Clip | None
) -> Iterator[dict[str, Any]]:
    """Yield the `images` and `videos` arguments of `ask`; a clip is written to a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        videos = []
        if clip is not None:
            videos.append(Path(folder) / "clip.mp4")
            write_mp4(clip, videos[0])
        yield {"images": list(pictures), "videos": videos}


def ask(
    vlm: SmolVLM, case: HeldoutCase, sampling: Sampling = LONGEST, detail: Detail = "high"
) -> Reply:
    """Ask `vlm` the question of `case`."""
    with make_media_items(case.pictures, case.clip) as media:
        return vlm.ask(case.messages, **media, sampling=sampling, detail=detail)


def compute_shares(
    vlm: SmolVLM, asked: Iterable[HeldoutCase], detail: Detail = "high"
) -> dict[str, tuple[int, int]]:
    """Return the number of exactly right answers of `vlm` and of all answers, by family."""
    right, total = Counter[str](), Counter[str]()
    for case in asked:
        total[case.family] += 1
        right[case.family] += ask(vlm, case, detail=detail).text == case.answer
    return {family: (right[family], number) for family, number in total.items()}
