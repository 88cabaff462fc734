"""The held-out dataset of the demo: every family of questions, drawn from seeds of its own.

    python -m demo_recipe.heldout --out FOLDER [--items 200] [--seed 0]

It writes FOLDER/heldout.jsonl, pictures as PNG and clips as H.264, in the format that
`mlx-smolvlm eval` reads. Training draws from other seeds, and never prints a word that is
held out.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo_recipe import plots, prints, words
from demo_recipe.batches import sample_size
from demo_recipe.clip_questions import ask_clip, select_makers
from demo_recipe.clips import Clip
from demo_recipe.film import write_mp4
from demo_recipe.items import LabeledPicture, Turn, join_parts
from demo_recipe.questions import make_small_talk
from demo_recipe.sample_clips import sample_clip
from demo_recipe.topics import LATE_TOPICS, TOPICS, ask_several, ask_unknown, draw

_REALM = 2**40  # training's seeds are far below
ALL_TOPICS = (*TOPICS, "several", "clips", "chat", *LATE_TOPICS)
# Pictures with words: these print words that training never sees.
_PRINTING = {"words": words.sample, "prints": prints.sample, "plots": plots.sample}
BY_DISTANCE = {"page", "page table"}  # long answers, which are scored by their edit distance
_ROUNDS = 60  # of pictures without a new item, after which a family is given up


@dataclass(frozen=True)
class Item:
    """A conversation to judge, its last answer expected."""

    task: str
    turns: list[Turn]
    pictures: tuple[LabeledPicture, ...] = ()
    clip: Clip | None = None

    @property
    def answer(self) -> str:
        """What is expected."""
        return join_parts(self.turns[-1].answer)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation with its expected answer, media items without a source."""
        shown = [{"type": "image"}] * len(self.pictures)
        shown += [{"type": "video"}] * (self.clip is not None)
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            asked = [*shown, {"type": "text", "text": join_parts(turn.question)}]
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": join_parts(turn.answer)})
            shown = []
        return messages


def make_items(topic: str, seed: int) -> list[Item]:
    """Draw a picture, pictures or a clip of `topic` from `seed`, and return questions about it."""
    rng = np.random.default_rng([_REALM, *topic.encode(), seed])
    if topic == "chat":
        return [Item("chat", [make_small_talk(rng)])]
    if topic == "clips":
        clip = sample_clip(rng)
        made = [ask_clip(clip, rng, 1, (maker,))[0] for maker in select_makers(clip)]
        return [Item(f"clip: {turn.family}", [turn], clip=clip) for turn in made]
    if topic == "several":
        pictures = tuple(_draw_picture(rng, _sample_topic(rng)) for _ in range(2))
        return [Item("several", [ask_several(list(pictures), rng)], pictures)]
    drawn = _draw_picture(rng, topic)
    made = [maker(rng) for maker, _ in drawn.makers]
    found = [Item(turn.family, [turn], (drawn,)) for turn in made]
    if rng.random() < 0.3:
        found.append(Item("cannot tell", [ask_unknown(rng)], (drawn,)))
    if drawn.talk is not None:
        found.append(Item("two turns", drawn.talk(rng), (drawn,)))
    return found


def _sample_topic(rng: np.random.Generator) -> str:
    return str(rng.choice([name for name, topic in TOPICS.items() if not topic.long]))


def _draw_picture(rng: np.random.Generator, topic: str) -> LabeledPicture:
    size = sample_size(rng, "square")
    if topic in _PRINTING:
        return _PRINTING[topic](rng, size, heldout=True)
    return draw(rng, topic, size)


def collect(
    topic: str, count: int, seed: int = 0, wanted: Collection[str] | None = None
) -> Iterator[Item]:
    """Up to `count` items of every family of `topic`, from one seed after the other.

    Args:
        wanted: Families; None is all.
    """
    found: Counter[str] = Counter()
    idle = 0
    for number in range(20 * count + _ROUNDS):
        before = found.total()
        for item in make_items(topic, 10**6 * seed + number):
            if found[item.task] < count and (wanted is None or item.task in wanted):
                found[item.task] += 1
                yield item
        idle = 0 if found.total() > before else idle + 1
        if idle > _ROUNDS:
            return


def write_dataset(out: Path, count: int, seed: int, wanted: set[str] | None = None) -> int:
    """Write `count` lines of each family to `out`/heldout.jsonl; return the number of lines."""
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    # By id; ids stay unique while the objects are in it.
    saved: dict[int, tuple[str, LabeledPicture | Clip]] = {}
    for topic in ALL_TOPICS:
        for item in collect(topic, count, seed, wanted):
            line: dict[str, Any] = {"task": item.task, "messages": item.messages}
            if item.task in BY_DISTANCE:
                line["metric"] = "anls"
            clips = () if item.clip is None else (item.clip,)
            for key, things in (("images", item.pictures), ("videos", clips)):
                for thing in things:
                    if id(thing) not in saved:
                        saved[id(thing)] = (_save_media(out, len(saved), thing), thing)
                    line.setdefault(key, []).append(saved[id(thing)][0])
            lines.append(json.dumps(line))
    (out / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    return len(lines)


def _save_media(out: Path, number: int, thing: LabeledPicture | Clip) -> str:
    """Write `thing` to a file in `out`, and return the file's name."""
    name = f"{number:05d}.png" if isinstance(thing, LabeledPicture) else f"{number:05d}.mp4"
    if isinstance(thing, LabeledPicture):
        thing.picture.save(out / name)
    else:
        write_mp4(thing, out / name)
    return name


def main() -> None:
    """Write the dataset."""
    parser = argparse.ArgumentParser(description="Write the held-out dataset of the demo.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=200, help="of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", type=lambda text: set(text.split(",")))
    options = parser.parse_args()
    print(write_dataset(options.out, options.items, options.seed, options.families), "lines")


if __name__ == "__main__":
    main()
