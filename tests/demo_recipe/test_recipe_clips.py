"""Clips for the demo's training: true to their labels, asked and tokenized as videos are."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from demo_recipe import clip_questions as questions
from demo_recipe.clip_batches import make_clip_batch, make_clip_prefix
from demo_recipe.clips import (
    MOTIONS,
    Clip,
    Event,
    Motion,
    render_sampled_frames,
    sampled_indices,
)
from demo_recipe.draw import COLOR_NAMES, SHAPES, Shape, render
from demo_recipe.film import write_mp4
from demo_recipe.grounding import make_word_table
from demo_recipe.items import Turn, Wording, get_parts, join_parts
from demo_recipe.motion import make_frame_labels, make_token_labels, make_word_labels
from demo_recipe.prefix import ANSWERED_LAYER, ASKED_LAYER
from demo_recipe.rows import make_row
from demo_recipe.sample_clips import SAMPLED, sample_clip
from mlx_smolvlm.media.video import open_video
from mlx_smolvlm.prompt.builder import PromptBuilder


def clips(event: Event, count: int) -> list[Clip]:
    """Clips of a few seeds in which `event` happens."""
    return [sample_clip(np.random.default_rng(seed), None, event) for seed in range(count)]


def is_near(pixel: np.ndarray, rgb: tuple[int, int, int]) -> bool:
    """Whether a pixel has the color `rgb`."""
    return bool(np.abs(pixel - np.array(rgb)).max() <= 1)


def test_clip_follows_from_the_seed() -> None:
    first, second, other = (sample_clip(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first == second != other
    frames = [frame.tobytes() for frame in render_sampled_frames(first)]
    assert frames == [frame.tobytes() for frame in render_sampled_frames(second)]
    assert render_sampled_frames(first)[0].size == (first.width, first.height)


@pytest.mark.parametrize("count", SAMPLED)
def test_as_many_frames_are_sampled_as_wanted(count: int) -> None:
    for seed in range(20):
        clip = sample_clip(np.random.default_rng(seed), count)
        indices = sampled_indices(clip.frames, clip.fps)
        assert len(indices) == count
        assert (indices[0], indices[-1]) == (0, clip.frames - 1)
        assert clip.width % 2 == clip.height % 2 == 0
        assert abs(clip.duration_s - count) <= 0.6


def test_frames_are_sampled_as_smolvlm2_does() -> None:
    assert sampled_indices(270, 30) == (0, 33, 67, 100, 134, 168, 201, 235, 269)
    assert sampled_indices(10, 25) == (0,)
    assert len(sampled_indices(1995, 30)) == 32


def centroid(pixels: np.ndarray, background: tuple[int, int, int]) -> tuple[float, float]:
    """Middle (x, y) of the pixels that are not background, as shares of the sides."""
    rows, cols = np.nonzero(np.abs(pixels - np.array(background)).max(-1) > 8)
    return float(cols.mean()) / pixels.shape[1], float(rows.mean()) / pixels.shape[0]


def test_pixels_move_as_the_label_says() -> None:
    signs = {"right": (0, 1), "left": (0, -1), "down": (1, 1), "up": (1, -1)}
    seen = set()
    for clip in clips("moves", 80):
        if len(clip.shapes) > 1:
            continue
        frames = [np.asarray(frame, int) for frame in render_sampled_frames(clip)]
        places = [centroid(frame, clip.background[1]) for frame in frames]
        axis, sign = signs[clip.motion]
        ways = [(b[axis] - a[axis]) * sign for a, b in pairwise(places)]
        assert min(ways) > 0, clip
        assert sum(ways) > 0.23, clip
        assert abs(places[-1][1 - axis] - places[0][1 - axis]) < 0.05, clip
        seen.add(clip.motion)
    assert seen == set(MOTIONS[1:])


def test_what_does_not_move_stays() -> None:
    for clip in clips("stays", 30):
        frames = {frame.tobytes() for frame in render_sampled_frames(clip)}
        assert len(frames) == 1
        assert clip.motion == "none"
    pairs = [clip for clip in clips("moves", 80) if len(clip.shapes) == 2]
    assert len(pairs) > 20
    for clip in pairs:
        still = clip.shapes[1]
        for frame in render_sampled_frames(clip):
            assert is_near(np.asarray(frame, int)[int(still.y), int(still.x)], still.rgb)


def test_each_color_is_seen_in_order() -> None:
    for event in ("shape turns", "background turns"):
        for clip in clips(event, 40):  # type: ignore[arg-type]
            frames = [np.asarray(frame, int) for frame in render_sampled_frames(clip)]
            y, x = (0, 0)
            if event == "shape turns":
                y, x = int(clip.shapes[0].y), int(clip.shapes[0].x)
            shown = [
                [is_near(frame[y, x], rgb) for _, rgb in clip.paints].index(True)
                for frame in frames
            ]
            assert list(dict.fromkeys(shown)) == list(range(len(clip.paints))) == sorted(set(shown))
            assert shown == sorted(shown)
            assert len(set(clip.colors)) == len(clip.colors) >= 2


def clip_of(event: Event, *shapes: tuple[str, str], motion: Motion = "none") -> Clip:
    """A clip of three seconds with shapes of (colour, kind)."""
    made = tuple(
        Shape(kind, color, (1, 2, 3), 30 + 40 * i, 30, 8, 0.0, False, 0)
        for i, (color, kind) in enumerate(shapes)
    )
    turns = event in ("shape turns", "background turns")
    paints = (("red", (255, 0, 0)), ("blue", (0, 0, 255)), ("pink", (255, 105, 180)))
    return Clip(
        event=event,
        width=100,
        height=100,
        fps=10.0,
        frames=30,
        background=("red" if event == "background turns" else "white", (255, 255, 255)),
        shapes=made,
        travel=(0.0, 40.0) if motion == "down" else (0.0, 0.0),
        pace=1.0,
        motion=motion,
        paints=paints if turns else (),
        turns=(8, 20) if turns else (),
        smooth=False,
    )


Maker = Callable[[Clip, np.random.Generator], Turn]


def all_answers(maker: Maker, clip: Clip) -> dict[str, str]:
    """Answer to each question that `maker` asks about `clip`."""
    turns = [maker(clip, np.random.default_rng(seed)) for seed in range(2000)]
    pairs = [(join_parts(turn.question), join_parts(turn.answer)) for turn in turns]
    answers = dict(pairs)
    assert all(answers[question] == answer for question, answer in pairs)
    return answers


def test_answers_about_motion_are_true() -> None:
    clip = clip_of("moves", ("red", "circle"), ("blue", "square"), motion="down")
    ways = all_answers(questions.ask_direction, clip)
    assert ways["Which way does the circle move?"] == "Down."
    assert ways["Does the red circle move up or down?"] == "Down."
    assert ways["Which way does the square move?"] == "It stays still."
    assert ways["Which way does the star move?"] == "There is no star."
    assert "Does the circle move left or right?" not in ways
    assert all_answers(questions.ask_mover, clip)["What moves?"] == "A red circle."
    assert all_answers(questions.ask_mover, clip)["What stays still?"] == "A blue square."
    moves = all_answers(questions.ask_moves, clip)
    assert moves["Does the circle move?"] == moves["Does anything move?"] == "Yes."
    assert moves["Does the blue square move?"] == "No."
    assert all_answers(questions.ask_happens, clip)["What happens?"] == "A red circle moves down."
    assert join_parts(questions.describe_clip(clip)) == (
        "A red circle moves down and a blue square stays still, on a white background."
    )
    assert all_answers(questions.ask_turner, clip)["What changes color?"] == "Nothing."
    still = clip_of("stays", ("red", "circle"))
    assert all_answers(questions.ask_happens, still)["What happens?"] == "A red circle stays still."
    assert (
        all_answers(questions.ask_direction, still)["Which way does it move?"] == "It stays still."
    )
    assert all_answers(questions.ask_mover, still)["What moves?"] == "Nothing."


def test_nothing_moves_where_two_shapes_stay() -> None:
    still = clip_of("stays", ("red", "circle"), ("blue", "square"))
    assert set(all_answers(questions.ask_happens, still).values()) == {"Nothing moves."}
    assert join_parts(questions.describe_clip(still)) == "Nothing moves on a white background."
    assert all_answers(questions.ask_moves, still)["Is anything moving?"] == "No."
    assert all_answers(questions.ask_moves, still)["Does the square move or stay still?"] == (
        "It stays still."
    )


def boxes(said: Wording) -> dict[str, list[tuple[int, list[float]]]]:
    """Frame and pixels, of a picture of 100, of each part's boxes."""
    return {
        part.text: [(box.picture, [round(100 * side) for side in box.extent]) for box in part.boxes]
        for part in get_parts(said)
        if part.boxes
    }


def test_words_about_clips_point_to_what_they_name_frame_by_frame() -> None:
    clip = clip_of("moves", ("red", "circle"), ("blue", "square"), motion="down")
    moving = [(0, [22, 22, 38, 38]), (1, [22, 41, 38, 57]), (2, [22, 62, 38, 78])]
    still = [(frame, [62, 22, 78, 38]) for frame in range(3)]
    found = boxes(questions.describe_clip(clip))
    assert found == {"A red circle": moving, "down": moving, "a blue square": still}
    for seed in range(50):
        turn = questions.ask_direction(clip, np.random.default_rng(seed))
        if turn.family == "direction":
            (told,) = boxes(turn.question).values()
            assert told == (still if "square" in join_parts(turn.question) else moving)
            assert list(boxes(turn.answer).values()) == [told]
    # Of the frames 0, 14 and 29 each shows another color.
    turning = clip_of("shape turns", ("red", "circle"), ("green", "star"))
    at = [22, 22, 38, 38]
    assert boxes(questions.ask_order(turning, np.random.default_rng(0)).answer) == {
        "Red": [(0, at)],
        "blue": [(1, at)],
        "pink": [(2, at)],
    }
    ground = clip_of("background turns", ("green", "star"))
    assert boxes(questions.ask_order(ground, np.random.default_rng(0)).answer) == {
        "Red": [(0, [0, 0, 100, 100])],
        "blue": [(1, [0, 0, 100, 100])],
        "pink": [(2, [0, 0, 100, 100])],
    }


def test_answers_about_colors_are_true() -> None:
    clip = clip_of("shape turns", ("red", "circle"), ("green", "star"))
    assert set(all_answers(questions.ask_order, clip).values()) == {"Red, then blue, then pink."}
    ends = all_answers(questions.ask_ends, clip)
    assert ends["Which color comes first?"] == "Red."
    assert ends["What color is the circle at the end?"] == "Pink."
    assert all_answers(questions.ask_turner, clip)["What changes color?"] == "The circle."
    seen = all_answers(questions.ask_seen, clip)
    assert seen["What color is the star?"] == "Green."
    assert "What color is the circle?" not in seen
    assert join_parts(questions.describe_clip(clip)) == (
        "A circle turns red, then blue, then pink, beside a green star, on a white background."
    )
    ground = clip_of("background turns", ("green", "star"))
    assert join_parts(questions.describe_clip(ground)) == (
        "The background turns red, then blue, then pink, behind a green star."
    )
    assert all_answers(questions.ask_turner, ground)["What changes?"] == "The background."
    ends = all_answers(questions.ask_ends, ground)
    assert ends["What color is the background at the end?"] == "Pink."


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_clips_are_tokenized_as_files_are(
    demo_builder: PromptBuilder, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    clip = sample_clip(rng)
    turns = questions.ask_clip(clip, rng, 2, questions.select_makers(clip))
    write_mp4(clip, tmp_path / "clip.mp4")
    opened = open_video(tmp_path / "clip.mp4", demo_builder.config)
    assert opened.indices == sampled_indices(clip.frames, clip.fps)
    messages = []
    for number, turn in enumerate(turns):
        asked = [{"type": "video"}] * (number == 0) + [
            {"type": "text", "text": join_parts(turn.question)}
        ]
        messages.append({"role": "user", "content": asked})
        answer = [{"type": "text", "text": join_parts(turn.answer)}]
        messages.append({"role": "assistant", "content": answer})
    built = demo_builder.build(messages, [], add_generation_prompt=False, clips=[opened])
    row = make_row(demo_builder, turns, "\n\n")
    ids, weights = row.ids, row.weights
    made = [*make_clip_prefix(demo_builder, clip), *ids, *demo_builder.tokenizer.encode("\n").ids]
    assert made == built.tolist()
    learned = [token for token, weight in zip(ids, weights, strict=True) if weight]
    answers = demo_builder.tokenizer.decode(learned, skip_special_tokens=False)
    assert answers == "".join(f" {join_parts(turn.answer)}<end_of_utterance>" for turn in turns)


def test_prefix_is_in_the_words_of_smolvlm2(demo_builder: PromptBuilder) -> None:
    clip = replace(clip_of("moves", ("red", "circle"), motion="down"), fps=5.0, frames=17)
    text = demo_builder.tokenizer.decode(
        make_clip_prefix(demo_builder, clip), skip_special_tokens=False
    )
    image = "<fake_token_around_image><global-img>" + "<image>" * 16 + "<fake_token_around_image>"
    assert text == (
        "<|im_start|>User: You are provided the following series of three frames from a 0:00:03 "
        f"[H:MM:SS] video.\n\nFrame from 00:00:{image}\nFrame from 00:01:{image}"
        f"\nFrame from 00:03:{image}"
    )


@pytest.mark.parametrize("seed", [1, 2, 3, 8])
def test_batch_holds_what_its_places_say(demo_builder: PromptBuilder, seed: int) -> None:
    made = make_clip_batch(seed, demo_builder, 8)
    assert (made.row_ids.reshape(-1)[made.places + 1] == made.targets).all()
    assert made.weights.sum() == pytest.approx(1)
    images = (made.prefix_ids == demo_builder.config.image_token_id).sum()
    assert images == 16 * len(made.pixels)
    fake = demo_builder.tokenizer.token_to_id("<fake_token_around_image>")
    assert (made.prefix_ids.reshape(-1)[made.closings] == fake).all()
    assert len(made.closings) == len(made.frame_labels) == len(made.pixels)
    is_image = made.prefix_ids == demo_builder.config.image_token_id
    assert (made.image_places == np.flatnonzero(is_image)).all()
    assert len(made.labels) == len(made.extents) == len(made.pixels)
    assert {ANSWERED_LAYER} <= set(made.pointers) <= {ASKED_LAYER, ANSWERED_LAYER}
    for pointers in made.pointers.values():
        assert pointers.targets.any(1).all()
        assert not pointers.targets[:, ~is_image[0]].any()
    again = make_clip_batch(seed, demo_builder, 8)
    assert (made.pixels == again.pixels).all()
    assert (made.row_ids == again.row_ids).all()


@pytest.mark.parametrize("longest", [2, 3, 8])
def test_clips_of_a_batch_are_no_longer_than_wanted(
    demo_builder: PromptBuilder, longest: int
) -> None:
    lengths = set()
    for seed in range(12):
        made = make_clip_batch(seed, demo_builder, 8, longest)
        lengths.add(len(made.pixels) // len(made.prefix_ids))
    assert max(lengths) <= longest
    assert longest == 2 or len(lengths) > 1


def test_labels_of_frames_and_words(demo_builder: PromptBuilder) -> None:
    clip = clip_of("moves", ("red", "circle"), ("blue", "square"), motion="down")
    white, red, circle = (
        COLOR_NAMES.index("white"),
        COLOR_NAMES.index("red"),
        SHAPES.index("circle"),
    )
    down = MOTIONS.index("down")
    assert make_frame_labels(clip).tolist() == [
        [-1, -1, white, -1, -1, -1, 0, -1, -1, -1],
        [circle, red, white, 2, 3, down, 0, -1, red, 0],
        [circle, red, white, 2, 5, down, 0, red, red, 0],
    ]
    blue, pink = COLOR_NAMES.index("blue"), COLOR_NAMES.index("pink")
    turning = make_frame_labels(clip_of("shape turns", ("red", "circle")))
    assert turning[:, 1].tolist() == [red, blue, pink]
    assert turning[:, 6:].tolist() == [[0, -1, red, -1], [1, red, red, 2], [2, blue, red, 2]]
    ground = make_frame_labels(clip_of("background turns", ("green", "star")))
    assert ground[:, 2].tolist() == [red, blue, pink]
    assert ground[:, 6:9].tolist() == turning[:, 6:9].tolist()
    assert ground[:, 9].tolist() == [-1, 3, 3]
    tokenizer = demo_builder.tokenizer
    ids = tokenizer.encode("Is a red circle, a square, a star, a blue circle or a shape there?").ids
    found = [labels for _, *labels in make_word_labels(clip, ids, make_word_table(tokenizer))]
    none = [len(MOTIONS), -1, -1]
    assert found == [[down, red, red], [0, blue, blue], none, none]
    ids = tokenizer.encode("What color is the circle?").ids
    turning_clip = clip_of("shape turns", ("red", "circle"))
    assert make_word_labels(turning_clip, ids, make_word_table(tokenizer))[0][1:] == (0, red, pink)


def test_image_tokens_tell_what_was_before_and_how_it_moved() -> None:
    clip = clip_of("moves", ("red", "circle"), ("blue", "square"), motion="down")
    first, second, third = make_token_labels(clip, 4).reshape(3, 4, 4, 5)
    white, red, blue = (COLOR_NAMES.index(color) for color in ("white", "red", "blue"))
    circle, square = 1 + SHAPES.index("circle"), 1 + SHAPES.index("square")
    down = MOTIONS.index("down")
    assert (first == -1).all()
    # The circle goes from y = 30 to 50 to 70 of 100 at x = 30; the square stays at x = 70.
    assert second[1, 1].tolist() == [circle, red, down, 2, 2]
    assert second[2, 1].tolist()[:2] == [0, white]
    assert third[2, 1].tolist() == [circle, red, down, 2, 2]
    assert third[1, 2].tolist() == [square, blue, 0, 5, 2]
    assert third[0, 0].tolist() == [0, white, -1, -1, -1]


def test_files_hold_the_frames(demo_builder: PromptBuilder, tmp_path: Path) -> None:
    clip = sample_clip(np.random.default_rng(3), 3)
    write_mp4(clip, tmp_path / "clip.mp4")
    opened = open_video(tmp_path / "clip.mp4", demo_builder.config)
    assert (opened.fps, opened.num_frames) == (clip.fps, clip.frames)
    for frame in opened.read_frames():
        drawn = np.asarray(render(clip.scene(frame.index)), float)
        assert np.abs(np.asarray(frame.picture, float) - drawn).mean() < 6
