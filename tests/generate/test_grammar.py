"""Answers that fit a schema or a regular expression."""

import copy
import json
import math
import random
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import jsonschema
import mlx.core as mx
import numpy as np
import pydantic
import pytest

import mlx_smolvlm
import mlx_smolvlm.generate.loop
from demo_recipe.examples import make_example
from mlx_smolvlm import ConstraintError, Sampling, SmolVLM, SmolVLMWarning
from mlx_smolvlm.generate.engine import Engine
from mlx_smolvlm.generate.grammar import Constrainer, Constraint
from mlx_smolvlm.generate.json_schema import check_constraint, close_objects
from mlx_smolvlm.generate.loop import generate_constrained_tokens
from mlx_smolvlm.generate.sampling import make_sampler
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.prompt.builder import PromptBuilder
from mlx_smolvlm.prompt.template import ChatTemplate
from tests.helpers import random_schemas

FORMATS = jsonschema.FormatChecker(["ipv4", "uuid"])
STRING = re.compile(r'"(\\.|[^"\\])*"')
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer"}},
    "required": ["colour"],
}


@FORMATS.checks("date")
def is_date(value: object) -> bool:
    """RFC 3339's; Python's own dates begin in the year 1."""
    return not isinstance(value, str) or re.fullmatch(r"\d{4}-[01]\d-[0-3]\d", value) is not None


@pytest.fixture(scope="module", params=["random weights", "demo"])
def vlm(request: pytest.FixtureRequest, tiny: SmolVLM) -> SmolVLM:
    return tiny if request.param == "random weights" else mlx_smolvlm.load("demo")


def test_200_random_schemas(vlm: SmolVLM) -> None:
    schemas, texts = random_schemas.Schemas(0), set()
    for number in range(200):
        schema = schemas.draw()
        jsonschema.Draft202012Validator.check_schema(schema)
        reply = vlm.ask("Tell me", sampling=Sampling(schema=schema, max_tokens=460))
        case = f"{number}: {reply.text} for {json.dumps(schema)}"
        assert reply.finish_reason == "stop", case
        assert reply.parsed == json.loads(reply.text), case
        validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
        assert validator.is_valid(reply.parsed), case
        assert not re.search(r"\s", STRING.sub("", reply.text)), case
        texts.add(reply.text)
    assert len(texts) > 120  # else they were too simple to tell


def test_200_random_schemas_drawn_with_a_temperature(tiny: SmolVLM) -> None:
    schemas = random_schemas.Schemas(1)
    for number in range(200):
        schema = schemas.draw()
        sampling = Sampling(schema=schema, temperature=1.5, top_k=50, seed=number, max_tokens=460)
        reply = tiny.ask("Tell me", sampling=sampling)
        assert reply.finish_reason == "stop", reply.text
        validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
        assert validator.is_valid(reply.parsed), f"{reply.text} for {json.dumps(schema)}"


def test_a_temperature_varies_the_answer(tiny: SmolVLM) -> None:
    def drawn(seed: int) -> str:
        sampling = Sampling(regex="[a-z]{3}", temperature=1.0, seed=seed)
        return tiny.ask("Hi", sampling=sampling).text

    assert len({drawn(seed) for seed in range(8)}) > 3
    assert drawn(1) == drawn(1)


@pytest.mark.parametrize(
    "regex",
    [
        "yes|no",
        "^(red|green|blue)$",
        r"\d{4}-\d{2}",
        "[a-f0-9]{8}",
        "a/b|x/y",
        "(?i)hello",
        r"\s{2,3}x",
        "  two",
        "<image>|<end_of_utterance>",
        "line\nline",
        r"\([0-9A-Za-z_]{1,3}\)",
        "日本|köln",
        "",
        "a?b{0,2}",
        '"[^"]{1,5}"',
        r"[^\x00-\x7f]{1,3}",
    ],
)
def test_an_answer_matches_its_expression(vlm: SmolVLM, regex: str) -> None:
    stream = vlm.stream("Tell me", sampling=Sampling(regex=regex, max_tokens=40))
    text = "".join(chunk.text for chunk in stream)
    assert re.fullmatch(regex, text), text
    assert text == stream.reply.text
    assert stream.reply.finish_reason == "stop"
    assert stream.reply.parsed is None


def test_a_choice_of_the_model_is_its_own() -> None:
    # A constraint that allows every text does not change the answer.
    demo = mlx_smolvlm.load("demo")
    for question in ("Tell me", "What can you do?", "How many stars are there?"):
        free = demo.ask(question, sampling=Sampling(max_tokens=30))
        held = demo.ask(question, sampling=Sampling(max_tokens=30, regex="(?s:.*)"))
        assert held.token_ids == free.token_ids
        assert held.text.lstrip() == free.text
        assert held.finish_reason == free.finish_reason


def test_the_demo_answers_right_within_bounds() -> None:
    demo = mlx_smolvlm.load("demo")
    picture = Path(mlx_smolvlm.__file__).parents[1] / "examples" / "three.png"
    sampling = Sampling(regex="At the (top|bottom) (left|right)\\.")
    question = "Where is the square?"
    held = demo.ask(question, images=[picture], sampling=sampling)
    assert held.text == make_example("three.png").answer(question)


class Recorder(Constraint):
    """Records the index in the answer of every sampled token."""

    places: list[int]
    at: int

    def take_forced(self, most: int) -> list[int]:
        token_ids = super().take_forced(most)
        if not hasattr(self, "places"):
            self.places, self.at = [], 0
        self.at += len(token_ids)
        return token_ids

    def take(self, token_id: int) -> None:
        super().take(token_id)
        self.places.append(self.at)
        self.at += 1


class OneByOne(Recorder):
    """Samples every token, including those without an alternative."""

    def take_forced(self, most: int) -> list[int]:
        return super().take_forced(0)


class Run:
    """Records the computations of one constrained answer."""

    def __init__(self, vlm: SmolVLM, kind: type[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards, self.logits = 0, list[np.ndarray]()
        self.vlm, model = vlm, vlm.model
        prefill = mlx_smolvlm.generate.loop.prefill

        def counted(*arguments: Any) -> mx.array:
            self.forwards += 1
            return prefill(*arguments)

        def greedy(logits: mx.array) -> mx.array:
            self.logits.append(np.array(logits))
            return mx.argmax(logits, keepdims=True)

        monkeypatch.setattr(mlx_smolvlm.generate.loop, "prefill", counted)
        constrainer = vlm.engine.constrainer
        schema = {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green"]}, "shape": {"type": "boolean"}},
            "required": ["colour", "shape"],
        }
        text = mlx_smolvlm.generate.json_schema.make_grammar(schema, None, " ")
        self.constraint = kind(constrainer._tokenizer, text, " ")
        embeds = model.embed(np.arange(40, 60))
        cache = model.make_cache()
        self.token_ids = list(
            generate_constrained_tokens(model, embeds, cache, greedy, self.constraint, 100)
        )
        monkeypatch.setattr(mlx_smolvlm.generate.loop, "prefill", prefill)


def test_forced_tokens_go_together_and_change_nothing(
    vlm: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Run(vlm, Recorder, monkeypatch)
    one_by_one = Run(vlm, OneByOne, monkeypatch)
    assert together.token_ids == one_by_one.token_ids
    assert one_by_one.forwards == len(one_by_one.token_ids) > 20
    assert together.forwards == len(together.constraint.places) <= 4
    for place, logits in zip(together.constraint.places, together.logits, strict=True):
        other = one_by_one.logits[place]
        allowed = np.isfinite(logits)
        np.testing.assert_array_equal(allowed, np.isfinite(other))
        np.testing.assert_allclose(logits[allowed], other[allowed], atol=1e-4)


def test_the_cache_holds_what_was_said(tiny: SmolVLM) -> None:
    # A conversation continues from the cache, so it must hold the tokens in their order.
    constraint = tiny.engine.constrainer(
        Sampling(regex="(red|green) and then (yes|no) and [a-z]{3}")
    )
    embeds, cache = tiny.model.embed(np.arange(40, 60)), tiny.model.make_cache()
    sampler = make_sampler(Sampling())
    said = list(generate_constrained_tokens(tiny.model, embeds, cache, sampler, constraint, 100))
    held = cache.offset - 20
    assert 0 < held < len(said)
    more = tiny.model.embed(np.array([50, 51]))
    whole = mx.concatenate([embeds, tiny.model.embed(np.array(said[:held])), more], axis=1)
    np.testing.assert_allclose(tiny.model(more, cache)[0], tiny.model(whole)[0, -2:], atol=1e-4)


def test_a_cut_answer_is_not_parsed(tiny: SmolVLM) -> None:
    # The second property follows a sampled value, so limits cut forced tokens in two places.
    schema = {**COLOUR, "required": ["colour", "count"]}
    whole = tiny.ask("Hi", sampling=Sampling(schema=schema, max_tokens=60))
    for most in range(1, min(60, whole.generation_tokens)):
        reply = tiny.ask("Hi", sampling=Sampling(schema=schema, max_tokens=most))
        assert reply.finish_reason == "length"
        assert reply.token_ids == whole.token_ids[:most]
        assert reply.parsed is None
        assert reply.to_dict()["parsed"] is None


def test_an_answer_as_long_as_allowed_is_whole(vlm: SmolVLM) -> None:
    schema = {**COLOUR, "properties": {"colour": {"enum": ["red", "green"]}}}
    whole = vlm.ask("Hi", sampling=Sampling(schema=schema))
    exact = Sampling(schema=schema, max_tokens=whole.generation_tokens)
    reply = vlm.ask("Hi", sampling=exact)
    assert reply.token_ids == whole.token_ids
    assert reply.finish_reason == "stop"
    assert reply.parsed == whole.parsed == json.loads(whole.text)
    assert set(reply.token_ids).isdisjoint(vlm.config.eos_token_ids)


def test_the_model_may_end_where_the_expression_may(tiny: SmolVLM) -> None:
    ends = {
        len(reply.text): reply.token_ids[-1]
        for seed in range(30)
        if (reply := tiny.ask("Hi", sampling=Sampling(regex="a*", temperature=2.0, seed=seed)))
        and reply.finish_reason == "stop"
    }
    assert len(ends) > 1
    assert set(ends.values()) == {639}


def test_stop_texts_and_interruptions(vlm: SmolVLM) -> None:
    reply = vlm.ask("Hi", sampling=Sampling(schema=COLOUR, stop=('":',)))
    assert (reply.text, reply.finish_reason, reply.parsed) == ('{"colour', "stop", None)
    reply = vlm.ask("Hi", sampling=Sampling(schema={"enum": [12]}, stop=("2",)))
    assert (reply.text, reply.finish_reason, reply.parsed) == ("1", "stop", None)
    stream = vlm.stream("Hi", sampling=Sampling(schema=COLOUR))
    next(stream)
    stream.close()
    assert (stream.reply.finish_reason, stream.reply.parsed) == ("interrupted", None)


def test_a_conversation_keeps_to_the_schema(vlm: SmolVLM) -> None:
    schema = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 3}
    chat = vlm.chat(sampling=Sampling(schema=schema))
    first, second = chat.ask("Which?"), chat.ask("And then?")
    assert first.parsed
    assert second.parsed == json.loads(second.text)
    transcript = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And then?"},
    ]
    assert vlm.ask(transcript, sampling=Sampling(schema=schema)).token_ids == second.token_ids


@pytest.mark.parametrize("text", ["<image>", "<end_of_utterance>", "<|im_start|>", "日本"])
def test_a_special_token_in_a_schema_is_text(vlm: SmolVLM, text: str) -> None:
    schema = {
        "type": "object",
        "properties": {text: {"const": text}, "any": {"enum": [text, text + "x"]}},
        "required": [text, "any"],
    }
    stream = vlm.stream("Hi", sampling=Sampling(schema=schema))
    shown = "".join(chunk.text for chunk in stream)
    assert shown == stream.reply.text
    assert stream.reply.parsed[text] == text
    assert stream.reply.parsed["any"] in (text, text + "x")
    assert vlm.engine.prompt_builder.framing_token_ids.isdisjoint(stream.reply.token_ids)


def test_a_vocabulary_larger_than_the_tokenizer(tiny: SmolVLM) -> None:
    config = replace(tiny.config, text=replace(tiny.config.text, vocab_size=701))
    model = Model(config)
    model.update({"lm_head": {"weight": mx.random.normal((701, 64), key=mx.random.key(3))}})
    path = tiny.path / "tokenizer.json"
    template = (tiny.path / "chat_template.jinja").read_text()
    large = SmolVLM(Engine(tiny.path, config, model, PromptBuilder(path, template, config)))
    for seed in range(20):
        sampling = Sampling(regex=r"[\w ]{9}", temperature=5.0, seed=seed)
        assert len(large.ask("Hi", sampling=sampling).text) == 9


def test_every_eos_token_may_end_an_answer(tiny: SmolVLM) -> None:
    builder = tiny.engine.prompt_builder
    two = PromptBuilder.__new__(PromptBuilder)
    two.__dict__ = {**vars(builder), "config": replace(builder.config, eos_token_ids=(639, 0))}
    constraint = Constrainer(two)(Sampling(regex="a?"))
    allowed = np.flatnonzero(np.array(constraint.compute_mask()))
    spelled = [builder.tokenizer.decode([token]) for token in allowed]
    assert spelled == [" ", " a"][: len(spelled)]
    constraint.take(int(allowed[0]))
    ends = {0, 639} & set(np.flatnonzero(np.array(constraint.compute_mask())).tolist())
    assert ends == {0, 639}


def test_white_space_cannot_be_asked_for(tiny: SmolVLM) -> None:
    schema = {
        **COLOUR,
        "required": ["colour", "count"],
        "x-guidance": {"whitespace_flexible": True},
    }
    sampling = Sampling(schema=schema, temperature=3.0, seed=0)
    text = tiny.ask("Hi", sampling=sampling).text
    assert not re.search(r"\s", text)


class Fruit(Enum):
    APPLE = "apple"
    PEAR = "pear"


class Point(pydantic.BaseModel):
    x: int = pydantic.Field(ge=0, le=9)
    y: int | None = pydantic.Field(ge=-5, le=5)


class Dot(pydantic.BaseModel):
    kind: Literal["dot"]
    at: Point


class Line(pydantic.BaseModel):
    kind: Literal["line"]
    ends: tuple[Point, Point]


class Drawing(pydantic.BaseModel):
    """A drawing."""

    title: str = pydantic.Field(max_length=8, description="What it is called.")
    fruit: Fruit = Fruit.PEAR
    mark: Dot | Line = pydantic.Field(discriminator="kind")
    points: list[Point] = pydantic.Field(max_length=2)


def test_a_pydantic_model(vlm: SmolVLM) -> None:
    reply = vlm.ask("Hi", sampling=Sampling(schema=Drawing))
    assert isinstance(reply.parsed, Drawing)
    assert Drawing.model_validate_json(reply.text) == reply.parsed
    assert json.loads(json.dumps(reply.to_dict()))["parsed"]["title"] == reply.parsed.title


class Odd(pydantic.BaseModel):
    value: Literal[2, 4]

    @pydantic.field_validator("value")
    @classmethod
    def odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("it is even")
        return value


def test_a_model_that_refuses_what_fits_its_schema(tiny: SmolVLM) -> None:
    with pytest.warns(SmolVLMWarning, match=r"fits the schema but cannot be parsed.*it is even"):
        reply = tiny.ask("Hi", sampling=Sampling(schema=Odd))
    assert reply.finish_reason == "stop"
    assert reply.text in ('{"value":2}', '{"value":4}')
    assert reply.parsed is None


def test_a_number_longer_than_python_reads(tiny: SmolVLM) -> None:
    with pytest.warns(SmolVLMWarning, match="cannot be parsed"):
        assert mlx_smolvlm.generate.json_schema.parse_answer("1" * 5000, {}) is None
    with pytest.warns(SmolVLMWarning, match="cannot be parsed"):
        assert mlx_smolvlm.generate.json_schema.parse_answer("[" * 100_000, {}) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schema": "{nope"}, r"^schema is not JSON: .*line 1 column 2"),
        ({"schema": "[1]"}, r"^schema is \[1\]; it must be a JSON object"),
        ({"schema": "true"}, r"^schema is True; it must be a JSON object"),
        ({"schema": 5}, r"^schema is 5; it must be"),
        ({"schema": int}, r"^schema is <class 'int'>; it must be"),
        ({"schema": {"const": {1}}}, r"^schema is not JSON: .*set"),
        ({"schema": {"type": "strng"}}, r"^schema cannot be used: Invalid type: strng;"),
        ({"schema": {"properties": 5}}, r"^schema cannot be used: properties must be"),
        ({"schema": {"uniqueItems": True}}, r"^schema cannot be used: .*uniqueItems"),
        ({"schema": {"oneOf": [{"type": "number"}, {"const": 1}]}}, "^schema .*: oneOf"),
        ({"schema": {"$ref": "#/$defs/no"}}, r"^schema cannot be used: .*/\$defs/no"),
        ({"schema": {"pattern": "(a"}}, r"^schema cannot be used: unclosed group"),
        ({"schema": {"enum": []}}, r"^schema cannot be used: Unsatisfiable"),
        (
            {"schema": {"type": "integer", "minimum": 3, "maximum": 2}},
            r"^schema cannot be used: Unsatisfiable schema: minimum \(3\)",
        ),
        (
            {"schema": {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}},
            "^schema cannot be used: no answer can fit it",
        ),
        (
            {"schema": {"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}},
            "^schema cannot be used: .*Too many items",
        ),
        ({"schema": {"allOf": 5}}, "^schema cannot be used: allOf must be an array"),
        ({"schema": {"$ref": "#/\ud800"}}, r"^schema cannot be used: failed to parse"),
        (
            {"schema": '{"items":' * 900 + "{}" + "}" * 900},
            "^schema is nested more than 127 levels",
        ),
        ({"schema": '{"items":' * 10**5}, "^schema is not JSON: "),
        ({"schema": '{"const":' + "9" * 5000 + "}"}, "^schema is not JSON: Exceeds the limit"),
        ({"schema": {"minimum": 10**400}}, "^schema cannot be used: .*number out of range"),
        ({"regex": "(a"}, r"^regex '\(a' cannot be used: unclosed group"),
        ({"regex": "\ud800"}, "^regex has a character that is not valid Unicode"),
        ({"regex": "(" * 10**5 + "a" + ")" * 10**5}, "^regex .{,210} cannot be used: exceed"),
        ({"regex": "(a?){500}a{500}"}, r"^regex .* cannot be used: .*too many expressions"),
        ({"regex": "a(?=b)"}, r"^regex .* cannot be used: look-around"),
        ({"regex": "[a&&b]"}, r"^regex .* cannot be used: no answer can fit it"),
        ({"regex": 5}, r"^regex is 5; it must be a text"),
        ({"regex": "a", "schema": {}}, r"^schema and regex are both given"),
    ],
)
def test_what_cannot_be_followed_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Sampling(**wrong)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_schema_is_walked_within_bounds() -> None:
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(900):
        nested = {"items": nested}
    with pytest.raises(ValueError, match=r"^schema is nested more than 127 levels"):
        Sampling(schema=nested)
    own: dict[str, Any] = {"properties": {}}
    own["properties"]["a"] = own
    with pytest.raises(ValueError, match=r"^schema is nested more than 127 levels"):
        Sampling(schema=own)
    shared: dict[str, Any] = {"type": "string"}
    for _ in range(60):  # 2**60 strings, were each walked
        shared = {"properties": {"a": shared, "b": shared}}
    with pytest.raises(ValueError, match=r"^schema has more than 1,000,000 values"):
        Sampling(schema=shared)
    as_deep_as_can_be: dict[str, Any] = {"type": "string"}
    for _ in range(120):
        as_deep_as_can_be = {"type": "array", "items": as_deep_as_can_be}
    Sampling(schema=as_deep_as_can_be)


def mutated(schema: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return `schema` with arbitrary values in some places."""
    values = [0, -1, 2**63, 10**400, 0.5, math.inf, "", "#", "\ud800", "(a{1000}){1000}", True]
    values += [None, [], [64], {}, {"a": 1}, {"allOf": 5}, {1: 2}, (1,), b"x", {None: 1}]
    keys = ["allOf", "anyOf", "oneOf", "$ref", "if", "items", "prefixItems", "properties", "const"]
    keys += ["required", "minProperties", "pattern", "enum", "type", "maxItems", "$defs", "not"]
    places: list[Any] = [schema]
    for place in places:
        children = place.values() if isinstance(place, dict) else place
        places += [one for one in children if isinstance(one, dict | list)]
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(places)
        if isinstance(place, dict):
            place[rng.choice([*keys, *place])] = copy.deepcopy(rng.choice(values))
        elif place:
            place[rng.randrange(len(place))] = copy.deepcopy(rng.choice(values))
    return schema


def test_mutated_schemas_are_read_or_refused() -> None:
    schemas, read = random_schemas.Schemas(7), 0
    for seed in range(200):
        schema = mutated(copy.deepcopy(schemas.draw()), random.Random(seed))
        try:
            check_constraint(schema, None)
            read += 1
        except ValueError as error:
            if not re.fullmatch(r"schema [^\n]{,500}", str(error)):
                pytest.fail(f"{seed}: {error!r}")
        except Exception as error:
            pytest.fail(f"{seed}: {type(error).__name__}: {error}")
    assert 20 < read < 150


def test_a_token_that_is_not_allowed_is_an_error(tiny: SmolVLM) -> None:
    constraint = tiny.engine.constrainer(Sampling(regex="a"))
    with pytest.raises(ConstraintError, match="cannot be followed"):
        constraint.take(639)


def test_without_llguidance(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    message = r"not installed; install it with: pip install 'mlx-smolvlm\[json\]'"
    for wanted in ({"schema": COLOUR}, {"regex": "a"}):
        with pytest.raises(ConstraintError, match=message):
            Sampling(**wanted)  # type: ignore[arg-type]
    assert mlx_smolvlm.load(tiny_folder).ask("Hi", sampling=Sampling(max_tokens=3)).text


@pytest.mark.parametrize(
    ("schema", "is_closed"),
    [
        ({"properties": {"a": {}}}, True),
        ({"properties": {"a": {}}, "required": ["a"], "minProperties": 1}, True),
        ({"properties": {"a": {}}, "additionalProperties": True}, False),
        ({"properties": {"a": {}}, "patternProperties": {"^x": {}}}, False),
        ({"properties": {"a": {}}, "required": ["b"]}, False),
        ({"properties": {"a": {}}, "minProperties": 2}, False),
        ({"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]}, False),
        ({"properties": {"a": {}}, "$ref": "#/$defs/b"}, False),
        ({"type": "object"}, False),
    ],
)
def test_which_objects_are_closed(schema: dict[str, Any], is_closed: bool) -> None:
    original = json.dumps(schema)
    assert (close_objects(schema).get("additionalProperties") is False) == is_closed
    assert json.dumps(schema) == original


def test_names_are_not_taken_for_keywords() -> None:
    inner = {"properties": {"x": {}}}
    schema = {
        "properties": {"properties": inner, "items": {"items": inner}},
        "$defs": {"allOf": inner},
        "const": inner,
        "default": inner,
    }
    shut = {**inner, "additionalProperties": False}
    assert close_objects(schema) == {
        "properties": {"properties": shut, "items": {"items": shut}},
        "$defs": {"allOf": shut},
        "const": inner,
        "default": inner,
        "additionalProperties": False,
    }


def test_joined_objects_stay_open(tiny: SmolVLM) -> None:
    part = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    other = {"type": "object", "properties": {"b": {"const": 2}}, "required": ["b"]}
    schema = {"allOf": [part, other]}
    assert close_objects(schema) == schema
    Sampling(schema=schema)  # closed, nothing could fit it


@pytest.mark.parametrize(
    ("heading", "answer", "lead"),
    [
        ("Assistant:", "Assistant: {}<end_of_utterance>", " "),
        ("Assistant: ", "Assistant: {}<end_of_utterance>", ""),
        ("assistant\n", "assistant\n{}<|im_end|>", ""),
        ("<a>", "<a>\n {}", "\n "),
        ("Say:", "Assistant: {}", ""),
        ("Assistant:", "Assistant:", ""),
        ("Assistant:", "Assistant: (said) {}", ""),
    ],
)
def test_the_lead_is_what_the_template_writes(heading: str, answer: str, lead: str) -> None:
    said = answer.replace("{}", "{{ message.content[0].text }}")
    template = (
        "{% for message in messages %}{% if message.role == 'user' %}"
        "User: {{ message.content[0].text }}\n{% else %}"
        f"{said}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{heading}{{% endif %}}"
    )
    assert ChatTemplate(template).find_answer_lead() == lead
    refusing = template.replace("{% else %}", "{% else %}{{ raise_exception('no') }}")
    assert ChatTemplate(refusing).find_answer_lead() == ""


def test_answers_begin_as_in_training(vlm: SmolVLM) -> None:
    reply = vlm.ask("Hi", sampling=Sampling(schema=COLOUR))
    first = vlm.engine.prompt_builder.tokenizer.decode([reply.token_ids[0]])
    assert vlm.engine.prompt_builder.answer_lead == " "
    assert first.startswith(" ")
    assert reply.text.startswith("{")


@pytest.fixture(autouse=True)
def no_other_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SmolVLMWarning)
        yield
