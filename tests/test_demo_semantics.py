"""What features mean for answers: those that the demo gives right stay right, and for their cause.

The cases are held-out ones that the demo answers right, looked for when the tests run, so that
they are at hand whatever its weights are. Which mistake fails which test:
docs/decisions/semantic-tests.md.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

import mlx_smolvlm
from demo_recipe.draw import COLOR_NAMES, render
from demo_recipe.evaluate import HeldoutCase, ask, make_cases
from demo_recipe.questions import BACKGROUND
from mlx_smolvlm import CacheOptions, Sampling, SmolVLM, SmolVLMWarning, Video
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.media.tiles import Detail, Grid, compute_grid

SEED = 5  # of the cases here; test_demo.py's is 0
DEMO = Path(mlx_smolvlm.__file__).parent / "demo"
WHICH_BACKGROUND = BACKGROUND[0]
OPPOSITE = {
    "To the left.": "To the right.",
    "To the right.": "To the left.",
    "Up.": "Down.",
    "Down.": "Up.",
}


@pytest.fixture(scope="module")
def demo() -> SmolVLM:
    """The demo in float32, which remembers what it was asked."""
    return mlx_smolvlm.load("demo", dtype="float32")


@pytest.fixture(scope="module")
def cold() -> SmolVLM:
    """The demo in float32, which computes each answer anew."""
    return mlx_smolvlm.load("demo", dtype="float32", cache=CacheOptions(memory_bytes=0))


def known(
    vlm: SmolVLM, asked: Iterable[HeldoutCase], wanted: int, detail: Detail = "high"
) -> list[HeldoutCase]:
    """The first `wanted` of the cases `asked` that `vlm` answers right, each from nothing."""
    found: list[HeldoutCase] = []
    for case in asked:
        vlm.engine.memory.clear()
        if ask(vlm, case, detail=detail).text == case.answer:
            found.append(case)
        if len(found) == wanted:
            return found
    raise AssertionError(f"{len(found)} right answers; {wanted} are wanted")


def right(vlm: SmolVLM, asked: list[HeldoutCase], detail: Detail = "high") -> int:
    """How many of the cases `asked` `vlm` answers right."""
    return sum(ask(vlm, case, detail=detail).text == case.answer for case in asked)


@pytest.fixture(scope="module")
def some(cold: SmolVLM) -> list[HeldoutCase]:
    """Cases of several kinds that are answered right, off one tile."""
    wanted = {
        "shapes": {"color", "where", "count"},
        "charts": {"bars", "bar color"},
        "objects": {"object"},
    }
    found = []
    for topic, families in wanted.items():
        found += known(cold, make_cases(topic, 12, SEED, families), 2 * len(families), "low")
    return found


# Tiles


def test_small_print_is_read_off_its_tiles(cold: SmolVLM) -> None:
    found = known(cold, make_cases("pages", 40, SEED, {"page table"}), 4)
    assert right(cold, found, detail="low") <= 1


def test_lines_of_print_are_told_apart(cold: SmolVLM) -> None:
    """Where a shape lies, features say by themselves; which line is meant, their places too."""
    asked = list(make_cases("words", 10, SEED, {"line"}))
    assert right(cold, asked, "low") >= 6  # with mirrored patches it is fewer


# What is known already


@pytest.fixture(scope="module")
def grounds(cold: SmolVLM) -> dict[str, Image.Image]:
    """Pictures of one grid by what is said of their background, so that their prompts are equal."""
    found: dict[str, Image.Image] = {}
    for case in known(cold, make_cases("shapes", 12, SEED, {"background"}), 10):
        (picture,) = case.pictures
        said = cold.ask(WHICH_BACKGROUND, images=[picture]).text
        if compute_grid(picture.size, cold.config) == Grid(2, 2) and said == case.answer:
            found[said] = picture
    assert len(found) >= 4
    return found


def test_a_picture_in_the_place_of_another_is_seen(
    demo: SmolVLM, grounds: dict[str, Image.Image]
) -> None:
    demo.engine.memory.clear()
    for _ in range(2):  # what is known the second time is not mixed up either
        for answer, picture in grounds.items():
            assert demo.ask(WHICH_BACKGROUND, images=[picture]).text == answer
    chat = demo.chat()
    for answer, picture in grounds.items():
        assert chat.ask(WHICH_BACKGROUND, images=[picture]).text == answer
        chat.undo()


def test_a_picture_on_disk_is_not_taken_for_another(
    grounds: dict[str, Image.Image], tmp_path: Path
) -> None:
    for run in range(2):
        for answer, picture in grounds.items():
            vlm = mlx_smolvlm.load("demo", dtype="float32", cache=CacheOptions(folder=tmp_path))
            reply = vlm.ask(WHICH_BACKGROUND, images=[picture])
            assert reply.text == answer
            assert (reply.encoded_tiles == 0) is (run == 1)


def test_a_second_question_is_about_the_same_picture(cold: SmolVLM, demo: SmolVLM) -> None:
    found = known(cold, make_cases("shapes", 10, SEED, {"two turns"}), 8)
    for case in found:
        first, answer, _ = case.messages
        chat = demo.chat()
        question = "".join(item.get("text", "") for item in first["content"])
        assert chat.ask(question, images=case.pictures).text == answer["content"]
        assert chat.ask(case.question).text == case.answer
        chat.undo()
        assert chat.ask(case.question).text == case.answer  # what was taken back is not seen


def test_the_picture_stays_where_old_turns_go(cold: SmolVLM) -> None:
    """A bounded cache that has dropped the first answer still holds what it was about."""
    bound = mlx_smolvlm.load("demo", dtype="float32", cache=CacheOptions(max_kv_tokens=150))
    found = known(cold, make_cases("shapes", 3, SEED, {"where", "color", "background"}), 8)
    talk = {"role": "assistant", "content": "I see no picture here. Please add one. " * 12}
    shown = 0
    for case in found:
        (asked,) = case.messages
        again = {"role": "user", "content": [{"type": "text", "text": case.question}]}
        with pytest.warns(SmolVLMWarning, match="longer than max_kv_tokens"):
            reply = bound.ask([asked, talk, again], images=case.pictures)
        shown += reply.text == case.answer
    assert shown >= len(found) - 1


# Precision


@pytest.mark.parametrize("part", ["bits", "vision_bits", "connector_bits", "embeddings_bits"])
def test_eight_bits_keep_the_answers(some: list[HeldoutCase], tmp_path: Path, part: str) -> None:
    rest = dict.fromkeys(("bits", "vision_bits", "connector_bits", "embeddings_bits"), 16)
    options = ConvertOptions(**{**rest, part: 8})
    vlm = mlx_smolvlm.load(convert_checkpoint(DEMO, tmp_path / "out", options))
    assert right(vlm, some, "low") >= len(some) - 1


def test_all_parts_and_keys_and_values_of_eight_bits(
    some: list[HeldoutCase], tmp_path: Path
) -> None:
    folder = convert_checkpoint(DEMO, tmp_path / "out", ConvertOptions(bits=8))
    vlm = mlx_smolvlm.load(folder, cache=CacheOptions(kv_bits=8))
    assert right(vlm, some, "low") >= len(some) - 1


# Several at once


def test_answers_side_by_side(cold: SmolVLM, demo: SmolVLM) -> None:
    groups: dict[int, list[HeldoutCase]] = {}
    for case in make_cases("shapes", 3, SEED):
        if len(case.messages) == 1:
            groups.setdefault(id(case.pictures[0]), []).append(case)
    for group in groups.values():
        same = [case for case in group if ask(cold, case, detail="low").text == case.answer]
        assert len(same) >= len(group) - 2
        demo.engine.memory.clear()
        questions = [case.question for case in same]
        replies = demo.ask_many(same[0].pictures[0], questions, detail="low")
        assert [reply.text for reply in replies] == [case.answer for case in same]


def test_the_right_color_is_chosen(cold: SmolVLM, demo: SmolVLM) -> None:
    colors = [f"{name.capitalize()}." for name in COLOR_NAMES]
    for case in known(cold, make_cases("shapes", 10, SEED, {"color"}), 8, "low"):
        choice = demo.choose(case.question, colors, images=case.pictures, detail="low")
        assert choice.best == case.answer


def test_two_pictures_keep_their_order(cold: SmolVLM) -> None:
    asked = (case for case in make_cases("several", 60, SEED) if case.answer.endswith(" one."))
    swapped = {"The first one.": "The second one.", "The second one.": "The first one."}
    found = known(cold, asked, 8, "low")
    assert len({case.answer for case in found}) == 2
    turned = [
        cold.ask(case.messages, images=case.pictures[::-1], detail="low").text
        == swapped[case.answer]
        for case in found
    ]
    assert sum(turned) >= len(found) - 2  # by chance: a half


def test_an_answer_held_to_an_expression(cold: SmolVLM) -> None:
    sampling = Sampling(
        regex=r"(At the (top|bottom)( left| right)?|On the (left|right)|In the center)\."
    )
    for case in known(cold, make_cases("shapes", 10, SEED, {"where"}), 8, "low"):
        assert ask(cold, case, sampling, detail="low").text == case.answer


def test_letters_are_read_on_from_those_that_are_forced(cold: SmolVLM) -> None:
    asked = (case for case in make_cases("words", 20, SEED, {"word"}) if len(case.answer) > 3)
    for case in known(cold, asked, 6):
        sampling = Sampling(regex=f"[A-Z]{case.answer[1:3]}[A-Z]+")
        assert ask(cold, case, sampling).text == case.answer


# Videos


@pytest.fixture(scope="module")
def moving(cold: SmolVLM) -> list[HeldoutCase]:
    """Clips of which the demo says the way in which something moves."""
    asked = (
        case
        for case in make_cases("clips", 24, SEED, {"clip: direction"})
        if case.answer in OPPOSITE
    )
    found = known(cold, asked, 8)
    assert len({case.answer for case in found}) >= 3
    return found


def film(case: HeldoutCase, backwards: bool = False, **choice: float) -> Video:
    """The frames of a clip as they were drawn, or from the last to the first."""
    assert case.clip is not None
    frames = [render(case.clip.scene(index)) for index in range(case.clip.frames)]
    return Video(frames[::-1] if backwards else frames, source_fps=case.clip.fps, **choice)


def test_a_clip_backwards_moves_the_other_way(cold: SmolVLM, moving: list[HeldoutCase]) -> None:
    forth = back = 0
    for case in moving:
        forth += cold.ask(case.question, videos=[film(case)]).text == case.answer
        said = cold.ask(case.question, videos=[film(case, backwards=True)]).text
        back += said == OPPOSITE[case.answer]
    assert min(forth, back) >= len(moving) - 1


def test_the_first_color_backwards_is_the_last(cold: SmolVLM) -> None:
    found = known(cold, make_cases("clips", 8, SEED, {"clip: ends"}), 6)
    asked_for, back = set[str](), 0
    for case in found:
        assert case.clip is not None
        first, last = (f"{case.clip.colors[end].capitalize()}." for end in (0, -1))
        asked_for.add("first" if case.answer == first else "last")
        said = cold.ask(case.question, videos=[film(case, backwards=True)]).text
        back += said == (last if case.answer == first else first)
    assert len(asked_for) == 2
    assert back >= len(found) - 1


def test_what_lies_outside_of_a_range_is_not_seen(cold: SmolVLM) -> None:
    """Of three colors in order, a range leaves the last or the first out."""
    asked = (
        case
        for case in make_cases("clips", 14, SEED, {"clip: order of more"})
        if case.clip is not None and len(case.clip.colors) == 3
    )
    right_first = right_last = 0
    found = known(cold, asked, 6)
    for case in found:
        assert case.clip is not None
        (first, second, third), fps = case.clip.colors, case.clip.fps
        begun = film(case, end_s=case.clip.turns[1] / fps)
        ended = film(case, start_s=case.clip.turns[0] / fps)
        said = [cold.ask(case.question, videos=[video]).text for video in (begun, ended)]
        right_first += said[0] == f"{first.capitalize()}, then {second}."
        right_last += said[1] == f"{second.capitalize()}, then {third}."
    assert min(right_first, right_last) >= len(found) - 1


def test_fewer_and_more_frames_show_the_same_motion(
    cold: SmolVLM, moving: list[HeldoutCase]
) -> None:
    kept = 0
    for case in moving[:4]:
        replies = [cold.ask(case.question, videos=[film(case, fps=fps)]) for fps in (0.7, 2.0)]
        assert replies[0].video_frames < replies[1].video_frames
        kept += sum(reply.text == case.answer for reply in replies)
    assert kept >= 7


# What pictures come as


def test_a_picture_says_the_same_however_it_comes(cold: SmolVLM) -> None:
    for case in known(cold, make_cases("shapes", 4, SEED, {"where", "color"}), 6):
        (picture,) = case.pictures
        turned = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees, as a phone writes it
        picture.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
        for source in (turned.getvalue(), picture.convert("RGBA"), picture.quantize(256)):
            assert cold.ask(case.question, images=[source]).text == case.answer
