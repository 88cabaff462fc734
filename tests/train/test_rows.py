"""Rows of training: tokenized as prompts are, and drawn to the places that are to be seen."""

from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from demo_recipe.batches import (
    MIXES,
    Mix,
    QuestionOptions,
    find_named_places,
    find_pointers,
    make_picture_batch,
    make_picture_prefix,
)
from demo_recipe.clip_questions import ask_clip, select_makers
from demo_recipe.items import Box, Part, Turn, get_parts, join_parts
from demo_recipe.prefix import (
    ANSWERED_LAYER,
    ASKED_LAYER,
    Pointers,
    SharedPrefix,
    layer_states,
    pointer_loss,
)
from demo_recipe.rows import make_row
from demo_recipe.sample_clips import sample_clip
from demo_recipe.topics import TOPICS, Focus, ask, ask_several, draw, draw_shapes, make_talk
from mlx_smolvlm.kv.cache import Mask
from mlx_smolvlm.media.tiles import Detail, Grid, tile_picture
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.prompt.builder import PromptBuilder


def messages_of(turns: list[Turn], pictures: int, system: str | None) -> list[dict[str, Any]]:
    """`turns` as a user sends them, the pictures before the first question."""
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for turn in turns:
        asked = [{"type": "text", "text": join_parts(turn.question)}]
        shown = [{"type": "image"}] * (pictures if turn is turns[0] else 0)
        messages.append({"role": "user", "content": [*shown, *asked]})
        messages.append({"role": "assistant", "content": join_parts(turn.answer)})
    return messages


def check_row(
    builder: PromptBuilder,
    made: tuple[list[int], list[float]],
    built: np.ndarray,
    turns: list[Turn],
) -> None:
    """A prefix with its row is what was built, and the answers are its targets."""
    ids, weights = made
    assert [*ids, *builder.tokenizer.encode("\n").ids] == built.tolist()
    targets = [token for token, weight in zip(ids[-len(weights) :], weights, strict=True) if weight]
    expected = "".join(f" {join_parts(turn.answer)}<end_of_utterance>" for turn in turns)
    assert builder.tokenizer.decode(targets, skip_special_tokens=False) == expected


@pytest.mark.parametrize("system", [None, "Be concise."])
@pytest.mark.parametrize("detail", ["high", "low"])
@pytest.mark.parametrize("topic", TOPICS)
def test_a_picture_is_tokenized_as_prompts_are(
    demo_builder: PromptBuilder, topic: str, detail: Detail, system: str | None
) -> None:
    for seed, count in ((1, 1), (2, 2), (3, 2)):
        rng = np.random.default_rng(seed)
        drawn = draw(rng, topic, (200, 150))
        turns = ask(drawn, rng, count)
        grid = tile_picture(drawn.picture, demo_builder.config, detail).grid
        row = make_row(demo_builder, turns, "")
        ids = [*make_picture_prefix(demo_builder, [grid], system), *row.ids]
        built = demo_builder.build(
            messages_of(turns, 1, system), [grid], add_generation_prompt=False
        )
        check_row(demo_builder, (ids, row.weights), built, turns)


def test_several_pictures_and_none_are_tokenized_as_prompts_are(
    demo_builder: PromptBuilder,
) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        grids = [Grid(2, 2), Grid(0, 0), Grid(1, 2)][: 2 + seed % 2]
        turns = [ask_several([draw(rng, "shapes", (96, 96)) for _ in grids], rng)]
        row = make_row(demo_builder, turns, "")
        ids = [*make_picture_prefix(demo_builder, grids), *row.ids]
        built = demo_builder.build(
            messages_of(turns, len(grids), None), grids, add_generation_prompt=False
        )
        check_row(demo_builder, (ids, row.weights), built, turns)
        turns = make_talk(rng)
        row = make_row(demo_builder, turns, "User: ")
        start = demo_builder.tokenizer.token_to_id("<|im_start|>")
        built = demo_builder.build(messages_of(turns, 0, None), [], add_generation_prompt=False)
        check_row(demo_builder, ([start, *row.ids], row.weights), built, turns)


def conversations(seed: int) -> list[tuple[list[Turn], str]]:
    """Turns of every topic, of several pictures and of clips, with the text before them."""
    rng = np.random.default_rng(seed)
    made = [(ask(draw(rng, topic, (200, 200)), rng, 1 + seed % 2), "") for topic in TOPICS]
    made.append(([ask_several([draw(rng, "shapes", (96, 96)) for _ in range(2)], rng)], ""))
    clip = sample_clip(rng)
    return [*made, (ask_clip(clip, rng, 2, select_makers(clip)), "\n\n")]


def test_parts_point_from_their_own_tokens(demo_builder: PromptBuilder) -> None:
    decode = demo_builder.tokenizer.decode
    pointing = 0
    for turns, before in (one for seed in range(25) for one in conversations(seed)):
        row = make_row(demo_builder, turns, before)
        pieces = [decode([token], skip_special_tokens=False) for token in row.ids]
        ends = [0, *accumulate(len(piece) for piece in pieces)]  # ends[i + 1] is that of token i
        text, place = "", before
        asked, answered = [], []
        for turn in turns:
            text += place
            for part in get_parts(turn.question):
                text += part.text
                if part.boxes:  # its last token ends where it does
                    asked.append((ends.index(len(text)) - 1, part.boxes))
            text += "<end_of_utterance>\nAssistant: "
            for part in get_parts(turn.answer):
                first, last = len(text), len(text) + len(part.text)
                text += part.text
                if part.boxes:  # each of its tokens is foretold by the one before
                    tokens = [i for i in range(len(row.ids)) if first < ends[i + 1] <= last]
                    assert tokens
                    answered += [(token - 1, part.boxes) for token in tokens]
            text += "<end_of_utterance>"
            place = "\nUser: "
        assert text == "".join(pieces)
        assert sorted(row.question_pointers, key=lambda one: one[0]) == asked
        assert row.answer_pointers == answered
        pointing += len(asked) > 0
    assert pointing > 50


def test_boxes_of_a_picture_are_its_own_image_tokens(demo_builder: PromptBuilder) -> None:
    grids = [Grid(2, 2), Grid(2, 2)]
    prefix = make_picture_prefix(demo_builder, grids)
    names = [demo_builder.tokenizer.id_to_token(token) for token in prefix]
    second = len(names) - 1 - names[::-1].index("<row_1_col_1>")  # of the second picture
    corner = names.index("<row_2_col_2>", second)
    whole = names.index("<global-img>", second)
    lower_right = (Box((0.5, 0.5, 1.0, 1.0), picture=1),)
    turn = Turn("", (Part("Where is "), Part("it", lower_right), Part("?")), (Part("Here"),))
    row = make_row(demo_builder, [turn], "")
    pointers = find_pointers([row, row], grids, prefix, demo_builder.config)
    assert set(pointers) == {ASKED_LAYER}
    found = pointers[ASKED_LAYER]
    word = row.ids.index(demo_builder.tokenizer.token_to_id("Ġit"))
    assert found.places.tolist() == [word, len(row.ids) + word]
    # Of the crop all 4 x 4 tokens, of the global tile the last two columns of the last two rows.
    expected = [corner + 1 + i for i in range(16)]
    expected += [whole + 1 + 4 * y + x for y in (2, 3) for x in (2, 3)]
    for target in found.targets:
        assert np.flatnonzero(target).tolist() == expected


@pytest.mark.parametrize("mix", [mix for mix, _ in MIXES], ids=lambda mix: str(mix.topics[-1:]))
def test_batches_hold_what_their_places_say(demo_builder: PromptBuilder, mix: Mix) -> None:
    made = make_picture_batch(7, demo_builder, mix)
    assert (made.row_ids.reshape(-1)[made.places + 1] == made.targets).all()
    assert made.weights.sum() == pytest.approx(1)
    assert made.prefix_ids.shape[0] == mix.conversations
    assert made.row_ids.shape[0] == mix.conversations * mix.rows
    is_image = made.prefix_ids == demo_builder.config.image_token_id
    if made.shown is None:
        assert not is_image.any()
        assert not made.pointers
        return
    assert (is_image == is_image[0]).all()  # so that the first one's places serve for all
    assert is_image.sum() == 16 * len(made.shown.pixels)
    assert set(made.pointers) == {ASKED_LAYER, ANSWERED_LAYER}
    for pointers in made.pointers.values():
        assert pointers.targets.any(1).all()
        assert not pointers.targets[:, ~is_image[0]].any()
    again = make_picture_batch(7, demo_builder, mix)
    assert again.shown is not None
    assert (again.row_ids == made.row_ids).all()
    assert (again.shown.pixels == made.shown.pixels).all()


def direct_loss(queries: np.ndarray, keys: np.ndarray, pointers: Pointers) -> float:
    """What `pointer_loss` says, by a softmax for each place."""
    _, length, width = queries.shape
    first, losses = keys.shape[1] - length, []
    for place, target in zip(pointers.places, pointers.targets, strict=True):
        row, own = divmod(int(place), length)
        scores = keys[row, : first + own + 1] @ queries[row, own] / np.sqrt(width)
        weights = np.exp(scores) / np.exp(scores).sum()
        losses.append(-np.log(weights[:first][target].sum()))
    return float(np.mean(losses))


def test_pointer_loss_is_the_attention_that_misses_the_targets() -> None:
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(3, 5, 8)), rng.normal(size=(3, 12, 8))
    targets = rng.random((6, 7)) < 0.4
    targets[:, 2] = True
    pointers = Pointers(np.array([0, 4, 5, 8, 11, 14], np.int32), targets)
    found = pointer_loss(
        mx.array(queries.astype(np.float32)), mx.array(keys.astype(np.float32)), pointers
    )
    assert found.item() == pytest.approx(direct_loss(queries, keys, pointers), abs=1e-5)


class Recorder(SharedPrefix):
    """Notes the first head's queries and keys of each call, by layer."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.seen: list[tuple[int, np.ndarray, np.ndarray]] = []

    def attend(self, layer: int, queries: mx.array, keys_values: mx.array, mask: Mask) -> mx.array:
        self.seen.append((layer, np.array(queries[:, 0]), np.array(keys_values[:, 0])))
        return super().attend(layer, queries, keys_values, mask)


def test_continuations_see_their_beginning(demo_builder: PromptBuilder) -> None:
    text_model = Model(demo_builder.config).text_model
    width, layers = demo_builder.config.text.hidden_size, len(text_model.layers)
    before = mx.random.normal((2, 7, width))
    after = mx.random.normal((4, 5, width))
    cache = Recorder(layers)
    states = layer_states(text_model, before, cache)
    assert len(states) == layers
    assert mx.abs(states[-1] - text_model(before)).max() < 1e-4
    cache.repeats = 2
    targets = np.zeros((2, 7), bool)
    targets[0, :3] = targets[1, 5] = True
    pointers = Pointers(np.array([3, 17], np.int32), targets)
    cache.pointers = {1: pointers}
    states = layer_states(text_model, after, cache)
    whole = text_model(mx.concatenate([mx.repeat(before, 2, axis=0), after], axis=1))
    assert mx.abs(states[-1] - whole[:, 7:]).max() < 1e-4
    (_, _, old), (_, queries, new) = [seen for seen in cache.seen if seen[0] == 1]
    keys = np.concatenate([old[[0, 0, 1, 1]], new], axis=1)
    (loss,) = cache.losses
    assert loss.item() == pytest.approx(direct_loss(queries, keys, pointers), rel=1e-4)


def test_words_for_what_is_not_there_look_at_the_beginning(demo_builder: PromptBuilder) -> None:
    asked = Turn("absent", "Where is the star?", "There is no star.", "star")
    later = Turn("count", "How many stars are there?", "0.", "stars")
    row = make_row(demo_builder, [asked, later, Turn("chat", "Hi", "Hello!")], " ")
    said = [demo_builder.tokenizer.decode(row.ids[: place + 1]) for place in row.missing_places]
    assert [text.rsplit(" ", 1)[1] for text in said] == ["star", "stars"]
    mix = Mix(("shapes",), 6, 4)
    old, new = (
        make_picture_batch(5, demo_builder, mix, QuestionOptions(missing=flag))
        for flag in (False, True)
    )
    assert (old.row_ids == new.row_ids).all()
    before, after = old.pointers[ASKED_LAYER], new.pointers[ASKED_LAYER]
    count = len(before.places)
    assert len(after.places) > count
    assert (after.places[:count] == before.places).all()
    assert (after.targets[:count] == before.targets).all()
    assert not before.targets[:, 0].any()
    assert (np.flatnonzero(after.targets[count:]) % after.targets.shape[1] == 0).all()
    assert after.targets[count:, 0].all()


def test_words_that_name_one_thing_tell_its_place_and_size(demo_builder: PromptBuilder) -> None:
    left, right = Box((0.0, 0.5, 0.25, 1.0)), Box((0.75, 0.0, 1.0, 0.24))
    question = (Part("Are the "), Part("star", (left,)), Part(" and the "), Part("moon", (right,)))
    both = Part(" shapes", (left, right))
    row = make_row(demo_builder, [Turn("beside", (*question, both), "No.")], "")
    found = find_named_places([row, row], len(row.ids) + 2)
    said = [demo_builder.tokenizer.decode(row.ids[: at + 1]) for at in found[:2, 0]]
    assert [text.rsplit(" ", 1)[1] for text in said] == ["star", "moon"]
    assert found[:2, 1:].tolist() == [[1, 9, 3, 6], [10, 1, 3, 2]]  # twelfths
    assert (found[2:, 0] == found[:2, 0] + len(row.ids) + 2).all()
    assert (found[2:, 1:] == found[:2, 1:]).all()
    mix = Mix(("shapes",), 3, 4)
    assert not len(make_picture_batch(5, demo_builder, mix).named)
    assert len(make_picture_batch(5, demo_builder, mix, QuestionOptions(places=True)).named)


def test_families_in_focus_are_asked_about_more_often() -> None:
    rng = np.random.default_rng(0)
    shares = []
    rare, _ = names = ("larger", "color")
    sized = Focus((rare,), 1.0, 80)
    drawn = [draw_shapes(rng, (96, 96)) for _ in range(1000)]
    drawn = [one for one in drawn if ask(one, rng, 1, sized)[0].family == rare]
    assert len(drawn) > 100
    for focus in (Focus(), Focus(names, 0.5), Focus(names, 0.5, 80, True)):
        families = [ask(one, rng, 1, focus)[0].family for one in drawn for _ in range(4)]
        shares.append({name: families.count(name) / len(families) for name in names})
    plain, focused, evenly = shares
    assert sum(focused.values()) > sum(plain.values()) + 0.1
    assert evenly[rare] > focused[rare] + 0.03
