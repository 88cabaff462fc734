"""How tokens are drawn: values that are refused, and distributions compared with NumPy's."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import typer

from mlx_smolvlm.cli.args import make_sampling
from mlx_smolvlm.cli.terminal.talk import Talk
from mlx_smolvlm.generate.sampling import (
    Sampling,
    make_row_sampler,
    make_sampler,
)
from mlx_smolvlm.smolvlm import SmolVLM

LOGITS = np.array([1.0, 3.0, 2.5, 0.0, 2.0, -4.0], np.float32)
DRAWS = 20_000
CLI_DEFAULTS = {
    "temperature": 0.0,
    "top_p": 1.0,
    "max_tokens": 9,
    "seed": None,
    "stop": (),
    "draft": "auto",
    "schema": None,
    "regex": None,
}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", "0.2", "a number, 0 or above"),
        ("temperature", float("nan"), "a number"),
        ("temperature", float("inf"), "a number"),
        ("temperature", 10**400, "a number"),
        ("temperature", True, "a number"),
        ("temperature", None, "a number"),
        ("top_p", float("nan"), "above 0 and at most 1"),
        ("top_p", "1", "above 0 and at most 1"),
        ("min_p", [0.1], "at least 0 and below 1"),
        ("top_k", 1.5, "an integer, 0 or above"),
        ("top_k", 2.0, "an integer"),
        ("top_k", True, "an integer"),
        ("top_k", None, "an integer"),
        ("seed", 2**64, r"from 0 to 2\*\*64 - 1"),
        ("seed", 1.0, "an integer"),
        ("seed", "1", "an integer"),
        ("max_tokens", 2.5, "an integer, 1 or above"),
        ("max_tokens", True, "an integer"),
        ("max_tokens", np.float64(3), "an integer"),
        ("stop", None, "a list of texts, none empty"),
        ("stop", 5, "a list of texts"),
        ("stop", [1], "a list of texts"),
        ("stop", ["a", b"b"], "a list of texts"),
        ("stop", b"ab", "a list of texts"),
        ("stop", ["a", ""], "none empty"),
    ],
)
def test_values_of_a_wrong_type(name: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*; it must be .*{words}") as raised:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert len(str(raised.value)) < 300


def test_numpy_scalars_are_numbers() -> None:
    sampling = Sampling(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=1,
        top_k=np.int64(3),  # type: ignore[arg-type]
        max_tokens=np.uint8(4),  # type: ignore[arg-type]
        seed=np.uint64(2**64 - 1),  # type: ignore[arg-type]
        stop=["a", "b"],  # type: ignore[arg-type]
    )
    assert sampling == Sampling(0.5, 1.0, 3, 0.0, 4, 2**64 - 1, ("a", "b"))
    for name, kind in (("temperature", float), ("top_p", float), ("top_k", int), ("seed", int)):
        assert type(getattr(sampling, name)) is kind
    assert hash(sampling) == hash(Sampling(0.5, 1.0, 3, 0.0, 4, 2**64 - 1, ("a", "b")))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--temperature", {"temperature": float("nan")}),
        ("--top-p", {"top_p": 0.0}),
        ("--max-tokens", {"max_tokens": 0}),
        ("--seed", {"seed": 2**64}),
        ("--stop", {"stop": ("",)}),
        ("--draft", {"draft": "8"}),
        ("--draft", {"draft": "on"}),
    ],
)
def test_the_command_line_names_the_option(option: str, values: dict[str, object]) -> None:
    with pytest.raises(typer.BadParameter) as raised:
        make_sampling(**{**CLI_DEFAULTS, **values})  # type: ignore[arg-type]
    assert raised.value.exit_code == 2
    assert raised.value.param_hint == option


def test_the_command_line_passes_every_option_on() -> None:
    values = {"temperature": 0.7, "top_p": 0.8, "max_tokens": 5, "seed": 6, "stop": ("x",)}
    sampling = make_sampling(**{**CLI_DEFAULTS, **values})  # type: ignore[arg-type]
    assert sampling == Sampling(**values)  # type: ignore[arg-type]
    for text, draft in (("auto", "auto"), ("off", "off"), ("7", 7)):
        assert make_sampling(**{**CLI_DEFAULTS, "draft": text}).draft == draft  # type: ignore[arg-type]


def filtered(sampling: Sampling, at: float) -> np.ndarray:
    """Return the probabilities of `LOGITS` if the filters are applied at the temperature `at`."""
    share = np.exp(LOGITS.astype(np.float64) / at)
    share /= share.sum()
    likelier = np.array([share[share > one].sum() for one in share])
    rank = np.array([(share > one).sum() for one in share])
    keep = (likelier < sampling.top_p) & (share >= sampling.min_p * share.max())
    keep &= rank < (sampling.top_k or LOGITS.size)
    final = np.where(keep, np.exp(LOGITS.astype(np.float64) / sampling.temperature), 0)
    result: np.ndarray = final / final.sum()
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.2},
        {"temperature": 4.0},
        {"temperature": 4.0, "top_p": 0.6},
        {"temperature": 0.2, "top_p": 0.6},
        {"temperature": 4.0, "min_p": 0.3},
        {"temperature": 0.2, "min_p": 0.3},
        {"temperature": 4.0, "top_k": 3},
        {"temperature": 4.0, "top_k": 6},
    ],
    ids=str,
)
def test_draws_are_distributed_as_the_options_say(options: dict[str, float]) -> None:
    mx.random.seed(5)
    sampling = Sampling(**options)  # type: ignore[arg-type]
    logits = mx.array(np.tile(LOGITS, (DRAWS, 1)))
    ids = np.array(make_row_sampler(sampling)(logits, np.zeros(DRAWS, int)))
    shares = np.bincount(ids, minlength=LOGITS.size) / DRAWS
    expected = filtered(sampling, at=1.0)
    spread = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (abs(shares - expected) <= 4 * spread).all()
    if sampling.top_p < 1 or sampling.min_p:  # else the order could not be told
        after = filtered(sampling, at=sampling.temperature)
        assert (abs(shares - after) > 4 * spread + 0.01).any()


@pytest.mark.parametrize("temperature", [0.2, 4.0])
def test_single_draws_are_distributed_as_rows(temperature: float) -> None:
    sampler = make_sampler(Sampling(temperature=temperature, seed=5))
    ids = mx.concatenate([sampler(mx.array(LOGITS)) for _ in range(300)])
    shares = np.bincount(np.array(ids), minlength=LOGITS.size) / 300
    expected = filtered(Sampling(temperature=temperature), at=1.0)
    assert (abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / 300)).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-42},
        {"temperature": 1e-9, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 1e-300},
    ],
    ids=str,
)
def test_next_to_nothing_is_greedy(options: dict[str, float]) -> None:
    sampler = make_sampler(Sampling(**options, seed=0))  # type: ignore[arg-type]
    assert {sampler(mx.array(LOGITS)).item() for _ in range(20)} == {1}


@pytest.mark.parametrize("kept", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}], ids=str)
def test_the_highest_temperature_keeps_to_what_is_kept(kept: dict[str, float]) -> None:
    sampler = make_sampler(Sampling(temperature=1e300, seed=0, **kept))  # type: ignore[arg-type]
    assert {sampler(mx.array(LOGITS)).item() for _ in range(60)} == {1, 2}


def state() -> list[int]:
    numbers: list[int] = np.array(mx.random.state[0]).tolist()
    return numbers


def test_a_seed_leaves_the_global_random_state_alone() -> None:
    mx.random.seed(11)
    before = state()
    sampling = Sampling(temperature=1.0, seed=3)
    logits = mx.array(np.arange(83, dtype=np.float32) / 30)
    one, other = make_sampler(sampling), make_sampler(sampling)
    taken_in_turns = [(one(logits).item(), other(logits).item()) for _ in range(9)]
    rows = make_row_sampler(sampling)(mx.array(np.tile(logits, (9, 1))), np.arange(9))
    assert [(a, a) for a in rows.tolist()] == taken_in_turns
    assert len({*taken_in_turns}) > 5
    assert state() == before


def test_an_interrupted_sampler_does_not_spoil_later_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> mx.array:
        raise KeyboardInterrupt

    logits = mx.array(np.arange(83, dtype=np.float32) / 30)
    mx.random.seed(11)
    before = state()
    sampler = make_sampler(Sampling(temperature=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(mx.random, "categorical", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sampler(logits)
    assert state() == before
    ids = [sampler(logits).item() for _ in range(5)]
    assert state() != before
    mx.random.seed(11)
    assert ids == [sampler(logits).item() for _ in range(5)]


@pytest.mark.parametrize("regex", [None, "[a-z ]{6}"])
@pytest.mark.parametrize("top_k", [640, 100_000])
def test_a_top_k_of_the_vocabulary_keeps_all(tiny: SmolVLM, top_k: int, regex: str | None) -> None:
    def sampling(top_k: int) -> Sampling:
        return Sampling(temperature=1.0, top_k=top_k, seed=4, max_tokens=5, regex=regex)

    def said(top_k: int) -> list[list[int]]:
        one = tiny.ask("Hi", sampling=sampling(top_k))
        many = tiny.ask_many(None, ["Hi", "What?"], sampling=sampling(top_k))
        chat = tiny.chat(sampling=sampling(top_k)).ask("Hi")
        return [reply.token_ids for reply in (one, *many, chat)]

    assert said(top_k) == said(0)


@pytest.mark.parametrize("regex", [None, "[a-z]{6}"])
def test_answers_depend_on_the_temperature(tiny: SmolVLM, regex: str | None) -> None:
    def said(temperature: float) -> list[list[int]]:
        sampling = Sampling(temperature=temperature, seed=1, max_tokens=6, regex=regex)
        one = tiny.ask("Hi", sampling=sampling)
        many = tiny.ask_many(None, ["Hi", "What?"], sampling=sampling)
        chat = tiny.chat(sampling=sampling).ask("Hi")
        return [reply.token_ids for reply in (one, *many, chat)]

    greedy, nearly, usual, high = (said(temperature) for temperature in (0, 1e-300, 1, 4))
    assert greedy == nearly
    assert all(a != b and b != c for a, b, c in zip(greedy, usual, high, strict=True))


def test_a_retry_with_the_largest_seed(tiny: SmolVLM) -> None:
    sampling = Sampling(temperature=1.0, seed=2**64 - 1, max_tokens=3)
    options = SimpleNamespace(
        pictures=False, system=None, sampling=sampling, detail="high", on_full="error"
    )
    printer = SimpleNamespace(print_answer=lambda stream: bool(stream.finish()))
    talk = Talk(tiny, options, printer)  # type: ignore[arg-type]
    talk.ask("Hi")
    first = talk._reply
    talk.retry()
    assert first is not None
    assert talk._reply is not None
    assert talk._reply.token_ids != first.token_ids
