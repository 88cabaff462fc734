"""Drafts: what is proposed and how many, and answers that are the same as without."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm import CacheOptions, Reply, Sampling, SmolVLM, load
from mlx_smolvlm.generate import draft
from mlx_smolvlm.generate.draft import Drafter, Governor, PromptLookup, constrain_draft
from mlx_smolvlm.generate.draft_loop import _sample_rows, generate_drafted_tokens
from mlx_smolvlm.generate.loop import generate_tokens
from mlx_smolvlm.generate.sampling import MAX_DRAFT
from mlx_smolvlm.kv.bounded import BoundedKVCache
from mlx_smolvlm.kv.cache import KVCache
from tests.helpers.recital import Recital

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = "Convert this page to docling."
QUESTIONS = (
    *(PAGE, "Describe this image.", "How many objects are there?", "What is the title?"),
    *("Read it. Read it. Read it.", "List the items.", "What do you see at the top?"),
    *("Is there a house?", "Is there a house? Is there a tree?", "What does the chart show?"),
)
NUMBERS = range(50, 60)
ROWS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"enum": [1, 2]}},
        "required": ["name", "n"],
    },
    "minItems": 3,
    "maxItems": 3,
}


def propose(token_ids: list[int], most: int = MAX_DRAFT, excluded: int = -1) -> list[int]:
    return PromptLookup(np.array(token_ids), lambda: NUMBERS, [excluded], [99]).propose(most)


def make_drafter(token_ids: list[int], triggers: tuple[int, ...] | None = None) -> Drafter:
    return Drafter(PromptLookup(np.array(token_ids)), Governor(MAX_DRAFT), triggers)


@pytest.fixture(scope="module")
def demo() -> SmolVLM:
    return load("demo")


def test_proposes_what_followed_the_longest_suffix() -> None:
    assert propose([1, 2, 3, 4, 2, 3, 5, 1, 2, 3], 2) == [4, 2]
    assert propose([7, 3, 4, 8, 3, 5, 9, 3], 2) == [5, 9]  # the last of equal matches


def test_proposes_nothing_after_something_new() -> None:
    assert propose([1, 2, 3, 4]) == []
    assert propose([1]) == propose([]) == []


def test_a_repetition_goes_on() -> None:
    assert propose([5, 6, 5, 6], 5) == [5, 6, 5, 6, 5]


def test_a_proposal_ends_before_a_placeholder_and_after_an_end() -> None:
    assert propose([1, 2, 3, 4, 8, 1, 2], excluded=4) == [3]
    assert propose([1, 4, 8, 1], excluded=4) == []
    assert propose([4, 8, 1, 4], excluded=4) == []  # a placeholder is not fed with a draft
    assert propose([1, 2, 99, 4, 8, 1]) == [2, 99]


def test_numbers_match_each_other() -> None:
    assert propose([1, 50, 2, 3, 7, 2, 9, 1, 51, 2], 3) == [3, 7, 2]
    assert propose([1, 50, 2, 3, 1, 51, 4, 2, 1, 50], 1) == [2]  # the same numbers first
    assert propose([50, 2, 51]) == []  # a number alone says nothing


def test_a_token_counts_from_when_it_is_appended() -> None:
    lookup = PromptLookup(np.array([1, 2, 3]))
    assert lookup.propose(1) == []
    for token_id in (1, 2):
        lookup.append(token_id)
    assert lookup.propose(2) == [3, 1]


def test_drafts_widen_after_whole_hits_alone() -> None:
    governor, widths = Governor(7), []
    for _ in range(4):
        widths.append(governor.width)
        governor.record(governor.width, governor.width)
    assert widths == [1, 3, 7, 7]
    governor.record(7, 2)
    assert governor.width == 7
    governor.record(7, 0)
    assert governor.width == 3
    governor.record(1, 1)  # there was no more to draft
    assert governor.width == 3


def test_the_governor_stops_when_drafts_do_not_pay_and_tries_again() -> None:
    governor, tries = Governor(7), list[int]()
    for number in range(400):
        if governor.width:
            tries.append(number)
            governor.record(1, 0)
        else:
            governor.count_token()
    gaps = [second - first for first, second in pairwise(tries)]
    assert max(gaps) == gaps[-1] == 33
    assert len(tries) < 400 * 0.05


def test_tokens_that_are_computed_again_do_not_pay() -> None:
    for passes, is_paused in ((1, False), (2, True)):
        governor = Governor(7)
        for _ in range(3):
            governor.record(1, 1, passes)
        assert (governor.width == 0) == is_paused


def test_a_hit_shortens_the_next_pause() -> None:
    governor = Governor(7)
    for _ in range(6):
        while not governor.width:
            governor.count_token()
        governor.record(1, 0)
    governor = _wait(governor)
    governor.record(1, 1)
    while governor.width:
        governor.record(1, 0)
    pause = 0
    while not governor.width:
        governor.count_token()
        pause += 1
    assert pause == 4


def _wait(governor: Governor) -> Governor:
    while not governor.width:
        governor.count_token()
    return governor


def recite(text: list[int], prompt: int, **options: Any) -> tuple[Recital, Drafter, list[int]]:
    """Generate `text` from its first `prompt` tokens on with drafts."""
    model, drafter = Recital(text, **options), make_drafter(text[:prompt])
    cache = KVCache(1)
    embeds = model.embed(np.array(text[:prompt]))
    said = list(generate_drafted_tokens(model, embeds, cache, drafter, len(text) - prompt))  # type: ignore[arg-type]
    assert said == text[prompt:]
    assert [model.fed[place] for place in range(cache.offset)] == text[: cache.offset]
    return model, drafter, said


def test_repeated_text_takes_few_passes() -> None:
    text = [*range(40)] * 4
    model, drafter, said = recite(text, 40)
    assert model.passes * 4 < len(said)
    assert drafter.accepted >= len(said) - model.passes


def test_new_text_is_not_drafted() -> None:
    text = [*range(100)]
    model, drafter, said = recite(text, 5)
    assert model.passes == len(said)
    assert drafter.drafted == 0


def test_a_draft_ends_with_the_answer() -> None:
    text = [*range(9)] * 9
    for most in range(1, 20):
        model, drafter = Recital(text), make_drafter(text[:30])
        embeds = model.embed(np.array(text[:30]))
        said = generate_drafted_tokens(model, embeds, KVCache(1), drafter, most)  # type: ignore[arg-type]
        assert list(islice(said, 30)) == text[30 : 30 + most]
        assert drafter.accepted < most


def test_rejected_tokens_leave_the_cache() -> None:
    rng = np.random.default_rng(0)
    text = [0, *(x for _ in range(40) for x in (1, 2, 3, 4, int(rng.integers(5, 9))))]
    model, drafter, said = recite(text, 12)
    assert 0 < drafter.accepted < drafter.drafted
    assert model.passes < 0.7 * len(said)


def test_an_unclear_token_is_computed_alone() -> None:
    text = [*range(30)] * 4
    clear = recite(text, 30)[0].passes
    model, _, _ = recite(text, 30, doubtful=range(60, 120, 11))
    assert clear < model.passes


def test_how_clear_a_token_must_be_depends_on_the_precision() -> None:
    logits = mx.array([[1.0, 1.25, 0.0], [0.0, 2.0, 1.0]])
    for dtype, is_clear in (
        (mx.float32, [True, True]),
        (mx.float16, [True, True]),
        (mx.bfloat16, [False, True]),
    ):
        assert _sample_rows(logits.astype(dtype)) == ([1, 1], is_clear)
    assert _sample_rows(mx.array([[1.0, 1.0, 0.0]])) == ([0], [False])


def test_half_precision_has_the_same_answers() -> None:
    # On a CPU, rows of a product in half precision do not depend on each other.
    for dtype in ("float16", "bfloat16"):
        vlm = load("demo", dtype=dtype)
        replies = [assert_same(vlm, question, max_tokens=16) for question in QUESTIONS[4:7]]
        replies.append(assert_same(vlm, "a b c " * 12, regex="( a b c| a b| c){1,9}"))
        assert sum(reply.accepted_tokens for reply in replies) > 0


def test_a_bounded_cache_that_is_nearly_full_is_not_drafted(tiny: SmolVLM) -> None:
    # A bounded cache that is nearly full would drop tokens, and could not take a draft back.
    for limit in (64, 72):
        text = [5, 6, 7, 8] * 15
        embeds = tiny.model.embed(np.array(text))
        plain = BoundedKVCache(2, limit)
        expected = list(generate_tokens(tiny.model, embeds, plain, _greedy, 24))
        cache, drafter = BoundedKVCache(2, limit), make_drafter([*text, *expected] * 2 + text)
        said = list(generate_drafted_tokens(tiny.model, embeds, cache, drafter, 24))
        assert said == expected
        assert drafter.accepted == 0 if limit == 64 else drafter.accepted > 0
        assert cache.num_dropped > 0


def _greedy(logits: mx.array) -> mx.array:
    return mx.argmax(logits, keepdims=True)


def test_drafts_wait_for_a_tag() -> None:
    text = [1, 2, 3, 4] * 20
    for triggers, is_drafted in (((9,), False), ((3,), True), ((), False)):
        model, drafter = Recital(text), make_drafter(text[:8], triggers)
        embeds = model.embed(np.array(text[:8]))
        list(generate_drafted_tokens(model, embeds, KVCache(1), drafter, 40))  # type: ignore[arg-type]
        assert (drafter.drafted > 0) == is_drafted


def prompts(vlm: SmolVLM) -> Iterator[np.ndarray]:
    """150 texts: half repeat a part of themselves, and so do the answers of the demo."""
    rng = np.random.default_rng(1)
    ordinary = vlm.config.image_token_id
    for number in range(150):
        part = rng.integers(300, ordinary, rng.integers(3, 12))
        noise = rng.integers(300, ordinary, rng.integers(0, 20))
        yield np.concatenate([noise, *[part] * (1 + 3 * (number % 2))]).astype(np.int32)


def test_200_prompts_have_the_answers_without_drafts(demo: SmolVLM) -> None:
    model, accepted = demo.model, 0
    for ids in prompts(demo):
        embeds, most = model.embed(ids), 8 if ids.size > 12 else 4
        expected = list(generate_tokens(model, embeds, model.make_cache(), _greedy, most))
        drafter, cache = make_drafter(ids.tolist()), model.make_cache()
        said = list(generate_drafted_tokens(model, embeds, cache, drafter, most))
        assert said == expected
        accepted += drafter.accepted
    assert accepted > 60
    for name in ("page", "one", "two", "four", "chart"):
        for question in QUESTIONS:
            assert_same(demo, question, EXAMPLES / f"{name}.png", detail="low", max_tokens=12)


def assert_same(vlm: SmolVLM, *question: Any, **options: Any) -> Reply:
    """Check that an answer with drafts equals that without; return it."""
    most = options.pop("draft", MAX_DRAFT)
    expected = vlm.ask(*question, draft="off", **options)
    reply = vlm.ask(*question, draft=most, **options)
    assert reply.token_ids == expected.token_ids
    assert (reply.text, reply.finish_reason) == (expected.text, expected.finish_reason)
    assert reply.parsed == expected.parsed
    assert expected.drafted_tokens == 0
    assert reply.accepted_tokens <= reply.drafted_tokens
    return reply


def test_constrained_answers_are_the_same(demo: SmolVLM, tiny: SmolVLM) -> None:
    accepted = 0
    for vlm in (demo, tiny):
        for number in (0, 3):
            text = f"List {number} things. " * (1 + number)
            accepted += assert_same(vlm, text, schema=ROWS, max_tokens=200).accepted_tokens
            for most in (7, 20):
                assert_same(vlm, text, schema=ROWS, max_tokens=most)
            reply = assert_same(vlm, text, regex="(ab|cd|[a-d]{3},|ab ab){2,9}", draft="auto")
            accepted += reply.accepted_tokens
    assert accepted > 6


def test_a_draft_that_completes_the_answer_can_be_undone(demo: SmolVLM) -> None:
    constraint = demo.engine.constrainer(Sampling(regex="(ab|a)c"))
    token_ids = demo.engine.prompt_builder.tokenizer.encode(" ac", add_special_tokens=False).ids
    masks = []
    for _ in range(2):
        found = constrain_draft(token_ids, constraint, 20)
        assert found.is_complete
        assert constraint.is_complete
        assert len(found.masks or []) == len(found.guesses)
        constraint.undo(len(found.token_ids))
        assert not constraint.is_complete
        masks.append(np.array(constraint.compute_mask()).tolist())
    assert masks[0] == masks[1]
    assert constrain_draft([token_ids[0] + 1], constraint, 20).token_ids == []


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"kv_bits": 4}, {"max_kv_tokens": 96}])
def test_other_caches_have_the_same_answers(options: dict[str, int]) -> None:
    vlm = load("demo", cache=CacheOptions(**options))
    replies = [assert_same(vlm, question, max_tokens=60) for question in QUESTIONS[-4:]]
    replies += [assert_same(vlm, "a b c " * 12, regex="( a b c| a b| c){1,24}", max_tokens=60)]
    assert sum(reply.accepted_tokens for reply in replies) > 0


def test_what_is_remembered_is_what_was_said(tiny: SmolVLM, demo: SmolVLM) -> None:
    # The next turn goes on from a cache whose drafts were accepted and rejected.
    for vlm, first in ((tiny, "a b a b a b a b"), (demo, PAGE)):
        chats = [vlm.chat(draft=most) for most in ("off", MAX_DRAFT)]
        for question in (first, "And now?", "a b a b"):
            replies = [chat.ask(question, max_tokens=30) for chat in chats]
            vlm.engine.memory.clear()
            assert replies[0].token_ids == replies[1].token_ids
            # A last token that a draft ended with was not fed.
            assert replies[0].cached_tokens - 1 <= replies[1].cached_tokens


@pytest.mark.parametrize("regex", [None, "( a b c| a b| c){1,24}"])
def test_a_stop_text_inside_a_draft_ends_the_answer(tiny: SmolVLM, regex: str | None) -> None:
    question, options = "a b a b a b a b", {"max_tokens": 40, "regex": regex}
    whole = assert_same(tiny, question, **options)
    assert whole.accepted_tokens > 0
    for place in range(2, len(whole.text) - 3, 5):
        stop = whole.text[place : place + 3]
        assert assert_same(tiny, question, **options, stop=[stop]).finish_reason == "stop"
        assert assert_same(tiny, question, **options).token_ids == whole.token_ids


def test_each_token_is_a_chunk_and_an_interrupt_keeps_the_rest(tiny: SmolVLM) -> None:
    whole = tiny.ask("a b a b a b a b", max_tokens=40, draft="off")
    for count in range(1, 24, 3):
        stream = tiny.stream("a b a b a b a b", max_tokens=40, draft=MAX_DRAFT)
        chunks = [next(stream) for _ in range(count)]
        stream.close()
        assert all(chunk.token_id in whole.token_ids for chunk in chunks)
        assert stream.reply.token_ids == whole.token_ids[: len(stream.reply.token_ids)]
        assert stream.reply.finish_reason == "interrupted"
        assert_same(tiny, "a b a b a b a b", max_tokens=40)


def test_documents_are_drafted_by_default(demo: SmolVLM) -> None:
    tags = demo.engine.prompt_builder.document_token_ids
    names = [demo.engine.prompt_builder.tokenizer.id_to_token(token_id) for token_id in tags]
    assert {"<doctag>", "<otsl>", "<loc_0>", "<loc_500>"} <= set(names)
    assert "<fcel>" not in names
    page = demo.ask(PAGE, EXAMPLES / "page.png", detail="low")
    assert page.drafted_tokens > 0
    question = ("Describe this image.", EXAMPLES / "four.png")
    assert demo.ask(*question, detail="low", draft=7).drafted_tokens > 0
    demo.engine.prompt_builder.__dict__.pop("number_token_ids")
    assert demo.ask(*question, detail="low").drafted_tokens == 0
    assert "number_token_ids" not in demo.engine.prompt_builder.__dict__  # nor was it read


def test_which_answers_are_drafted(demo: SmolVLM) -> None:
    def is_drafted(**options: Any) -> bool:
        return draft.make_drafter(demo.engine, np.array([1, 2]), Sampling(**options)) is not None

    assert is_drafted()
    assert is_drafted(regex="a+")
    assert is_drafted(draft=1)
    for options in ({"draft": "off"}, {"temperature": 0.1}, {"temperature": 0.1, "draft": 7}):
        assert not is_drafted(**options)
        assert not is_drafted(**options, regex="a+")


@pytest.mark.parametrize("wrong", [0, 8, -1, "on", "7", True, 1.5, None])
def test_draft_refuses_other_values(wrong: object) -> None:
    with pytest.raises(ValueError, match=r'draft .* "auto", "off", or an integer from 1 to 7'):
        Sampling(draft=wrong)  # type: ignore[arg-type]
