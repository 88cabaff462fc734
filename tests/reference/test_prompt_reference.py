"""Prompts against transformers' processors, on the published tokenizers and templates."""

import pytest

pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_smolvlm.media.tiles import Grid
from mlx_smolvlm.prompt.builder import PromptBuilder, spell_number
from tests.helpers import media_cases as cases
from tests.helpers import oracle

pytestmark = pytest.mark.skipif(
    not (oracle.REFERENCE / "checkpoints").is_dir(),
    reason="the published tokenizers are not here; set SMOLVLM_REFERENCE",
)

WITH_IMAGES = [name for name, (kind, *_) in sorted(oracle.CHECKPOINTS.items()) if kind != "text"]


@pytest.fixture(scope="module", params=sorted(oracle.CHECKPOINTS))
def pair(request):
    """(our builder, transformers, whether there are images) of a published checkpoint."""
    kind, seq_len, image_token_id, vocab_size, _ = oracle.CHECKPOINTS[request.param]
    side, scale = {64: (32, 4), 81: (27, 3)}[seq_len]
    config = cases.config(
        tile=side * 16, scale=scale, image_token_id=image_token_id, vocab_size=vocab_size
    )
    builder = PromptBuilder(
        oracle.tokenizer_json(request.param), oracle.chat_template(request.param), config
    )
    return builder, oracle.Oracle(request.param), kind != "text"


def compare(pair, messages, grids, generation):
    ours, theirs, _ = pair
    result = ours.build(messages, [Grid(*grid) for grid in grids], generation).tolist()
    assert result == theirs.input_ids(messages, grids, generation)


def test_conversations(pair):
    compared = 0
    for messages, grids, generation in cases.CONVERSATIONS:
        if pair[2] or not grids:
            compare(pair, messages, grids, generation)
            compared += 1
    assert compared >= 16


@pytest.mark.parametrize("pair", WITH_IMAGES, indirect=True)
def test_every_grid(pair):
    for rows in range(1, 7):
        compare(pair, [cases.user(cases.IMAGE, "x")], [(rows, 7 - rows)], True)
        ours, theirs, _ = pair
        ids = theirs.input_ids([cases.user("x", cases.IMAGE)], [(rows, 7 - rows)], False)
        bare = theirs.input_ids([cases.user("x")], [], False)
        assert ours.count_image_tokens(Grid(rows, 7 - rows)) == len(ids) - len(bare)


text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12),
    st.text(st.sampled_from("ab 0\n\t.,:'<>|_é🦥"), max_size=12),
)


def test_any_conversation(pair):
    """Conversations that spell no special token: transformers takes those for real ones."""
    item = st.one_of(text, st.just(cases.IMAGE)) if pair[2] else text
    role = st.sampled_from([cases.user, cases.assistant, cases.system])
    grid = st.one_of(st.just((0, 0)), st.tuples(st.integers(1, 6), st.integers(1, 6)))

    @given(data=st.data())
    @settings(max_examples=30, deadline=None)
    def run(data):
        roles = data.draw(st.lists(role, min_size=1, max_size=4))
        messages = [make(*data.draw(st.lists(item, min_size=1, max_size=4))) for make in roles]
        images = sum(i["type"] == "image" for m in messages for i in m["content"])
        grids = [data.draw(grid) for _ in range(images)]
        compare(pair, messages, grids, data.draw(st.booleans()))

    run()


def test_numbers_are_spelled_as_num2words_spells_them() -> None:
    num2words = pytest.importorskip("num2words").num2words
    numbers = [*range(3000), *range(3000, 1_000_000, 997)]
    assert [spell_number(n) for n in numbers] == [num2words(n) for n in numbers]
