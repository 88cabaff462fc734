"""The held-out dataset: readable, true to its seed, apart from what training draws."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from demo_recipe.evaluate import HeldoutCase, compute_shares, make_cases
from demo_recipe.heldout import _REALM, ALL_TOPICS, collect, make_items, write_dataset
from demo_recipe.items import LabeledPicture, join_parts
from demo_recipe.lexicon import HELD_OUT, TRAINED, WORDS
from demo_recipe.run import STAGES
from demo_recipe.words import sample

FAMILIES = {
    "what",
    "describe",
    "color",
    "shape",
    "count",
    "where",
    "at",
    "exists",
    "larger",
    "beside",
}


def words_of(drawn: LabeledPicture) -> list[str]:
    """The words that a picture prints: a letter of rank 0 begins one."""
    words: list[str] = []
    for glyph in drawn.glyphs:
        words += [""] * (glyph.rank == 0)
        words[-1] += glyph.kind
    return words


def listed(folder: Path, seed: int = 0, wanted: set[str] | None = None) -> list[dict[str, object]]:
    """The lines of one item of each family."""
    count = write_dataset(folder, 1, seed, wanted)
    lines = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    assert len(lines) == count
    return lines


@pytest.mark.parametrize("topic", ["shapes", "words"])
def test_rare_families_have_as_many_items_as_others(topic: str) -> None:
    """The card promises 200; "larger" and "letter" need many pictures for that."""
    found = Counter(item.task for item in collect(topic, 200))
    assert {"shapes": "larger", "words": "letter"}[topic] in found
    assert set(found.values()) == {200}


def test_every_line_can_be_asked(tmp_path: Path) -> None:
    lines = listed(tmp_path)
    tasks = [item.task for topic in ALL_TOPICS for item in collect(topic, 1)]
    assert [line["task"] for line in lines] == tasks
    assert set(tasks) > FAMILIES | {"several", "two turns", "chat"}
    for line in lines:
        messages: list = line["messages"]  # type: ignore[type-arg,assignment]
        media = {"image": line.get("images", []), "video": line.get("videos", [])}
        assert [one["role"] for one in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert len(messages) == (4 if line["task"] == "two turns" else 2)
        for kind, names in media.items():
            placed = [one for one in messages[0]["content"] if one["type"] == kind]
            assert len(placed) == len(names)  # type: ignore[arg-type]
            for name in names:  # type: ignore[attr-defined]
                assert (tmp_path / name).stat().st_size
        for name in media["image"]:  # type: ignore[attr-defined]
            with Image.open(tmp_path / name) as picture:
                assert min(picture.size) >= 90
        assert all(isinstance(one["content"], str) for one in messages[1::2])
    by_distance = {line["task"] for line in lines if line.get("metric") == "anls"}
    assert by_distance == {"page", "page table"}
    chosen = listed(tmp_path / "chosen", wanted={"color", "chat"})
    assert [line["task"] for line in chosen] == ["color", "chat"]


def test_a_dataset_follows_from_its_seed(tmp_path: Path) -> None:
    wanted = {"color", "word", "clip: direction", "several"}
    made = [tmp_path / name for name in ("first", "second", "other")]
    for folder, seed in zip(made, (0, 0, 1), strict=True):
        listed(folder, seed, wanted)
    assert len({tuple(sorted(path.name for path in folder.iterdir())) for folder in made[:2]}) == 1
    files = [  # but clips, whose bytes are the encoder's matter
        {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".mp4"}
        for folder in made
    ]
    assert files[0] == files[1]
    (first,), (second,), (other,) = (
        {item.clip for item in collect("clips", 1, seed, {"clip: direction"})} for seed in (0, 0, 1)
    )
    assert first == second != other
    assert files[0]["heldout.jsonl"] != files[2]["heldout.jsonl"]
    assert files[0]["00000.png"] != files[2]["00000.png"]


@pytest.mark.parametrize("topic", ALL_TOPICS)
def test_every_family_has_as_many_items_as_wanted(topic: str) -> None:
    tasks = [item.task for item in collect(topic, 3)]
    assert tasks
    assert all(tasks.count(task) == 3 for task in tasks)


def test_held_out_words_are_printed_here_and_never_in_training() -> None:
    found = [item.pictures[0] for seed in range(40) for item in make_items("words", seed)]
    real = {word for drawn in found for word in words_of(drawn) if word in WORDS}
    assert len(real) > 5
    assert real <= set(HELD_OUT)
    assert not set(HELD_OUT) & set(TRAINED)
    printed: set[str] = set()
    for seed in range(2500):
        drawn = sample(np.random.default_rng(seed), (160, 160))
        printed.update(words_of(drawn))
        for maker, _ in drawn.makers if seed < 200 else ():
            said = join_parts(maker(np.random.default_rng(seed)).answer).strip(".").split()
            assert not set(said) & set(HELD_OUT)
    assert len(printed & set(TRAINED)) > 50
    assert not printed & set(HELD_OUT)


def test_training_never_draws_from_a_seed_of_the_held_out() -> None:
    longest = max(stage.steps for stage in STAGES)
    assert 10**6 * (len(STAGES) + 1) + longest + 500_000 < 10**9  # each run keeps to its own
    # A run with another seed begins at 10**9 times it; those of a thousand stay below.
    assert _REALM > 10**9 * 1000


class Knowing:
    """Stands for a model that knows every answer of some cases but those of `wrong` families."""

    def __init__(self, known: list[HeldoutCase], wrong: set[str]) -> None:
        self.known, self.wrong = known, wrong
        self.media: list[tuple[int, int]] = []

    def ask(self, prompt: list, images: list, videos: list, **_options: object) -> SimpleNamespace:
        case = next(one for one in self.known if one.messages == prompt)
        assert images == list(case.pictures)
        assert [av.open(str(path)).streams.video[0].frames for path in videos] == (
            [case.clip.frames] if case.clip else []
        )
        self.media.append((len(images), len(videos)))
        return SimpleNamespace(
            text=case.answer.lower() if case.family in self.wrong else case.answer
        )


def test_cases_are_the_items_of_the_dataset_up_to_their_answers() -> None:
    for topic in ALL_TOPICS:
        for case, item in zip(make_cases(topic, 2, seed=3), collect(topic, 2, seed=3), strict=True):
            assert (case.family, case.answer, case.clip) == (item.task, item.answer, item.clip)
            assert [*case.messages, {"role": "assistant", "content": case.answer}] == item.messages
            assert case.question == join_parts(item.turns[-1].question)
            assert len(case.pictures) == len(item.pictures)


def test_shares_of_right_answers() -> None:
    asked = [*make_cases("shapes", 3, families={"color", "two turns"}), *make_cases("several", 1)]
    asked += make_cases("clips", 1, families={"clip: ends"})
    vlm: Any = Knowing(asked, {"color"})
    assert compute_shares(vlm, asked) == {
        "color": (0, 3), "two turns": (3, 3), "several": (1, 1), "clip: ends": (1, 1),
    }  # fmt: skip
    assert vlm.media == [(1, 0)] * 6 + [(2, 0), (0, 1)]
