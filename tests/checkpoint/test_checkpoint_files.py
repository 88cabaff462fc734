"""The text files of a checkpoint: only regular ones of some size, and nothing that they say."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from mlx_smolvlm.checkpoint.headers import read_headers
from mlx_smolvlm.checkpoint.load import (
    build_checked_model,
    find_tokenizer,
    load_model,
    read_chat_template,
    read_config,
)
from mlx_smolvlm.checkpoint.lora import AdapterConfig, read_adapter_config
from mlx_smolvlm.checkpoint.provenance import check_sums, read_origin
from mlx_smolvlm.cli.doctor_checks import check_checkpoint as diagnose
from mlx_smolvlm.convert.hub import resolve
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint, plan_checkpoint
from mlx_smolvlm.convert.source import Source
from mlx_smolvlm.errors import CheckpointError, PromptError, SmolVLMError, shorten
from mlx_smolvlm.generate.grammar import Constrainer
from mlx_smolvlm.generate.sampling import Sampling
from mlx_smolvlm.prompt.builder import PromptBuilder
from mlx_smolvlm.prompt.tokenizer import convert_native_errors, read_tokenizer
from mlx_smolvlm.records import read_json
from tests.helpers import hf_folder as hf

HUGE = "1" + "0" * 400  # more than a float holds


@pytest.fixture(autouse=True)
def alarm():
    """Ends a test that waits for a pipe."""

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A checkpoint of this package's format that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "own"))


def builder_of(folder: Path) -> PromptBuilder:
    return PromptBuilder(find_tokenizer(folder), read_chat_template(folder), read_config(folder))


def change(path: Path, *keys, value) -> None:
    """Put `value`, JSON text, at `keys` of the JSON file at `path`."""
    values = json.loads(path.read_text())
    place = values
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = "@@"
    path.write_text(json.dumps(values).replace('"@@"', value))


# What is no file


def own_readers(folder: Path):
    """By file of a folder of ours, what reads it."""
    return {
        "config.json": lambda: read_config(folder),
        "tokenizer.json": lambda: read_tokenizer(folder / "tokenizer.json", 640),
        "chat_template.jinja": lambda: read_chat_template(folder),
        "model.safetensors": lambda: load_model(folder),
        "SHA256SUMS": lambda: list(check_sums(folder)),
        "origin.json": lambda: read_json(folder / "origin.json"),
        "adapter_config.json": lambda: read_adapter_config(folder),
    }


@pytest.mark.parametrize("name", own_readers(Path()))
@pytest.mark.parametrize("kind", ["pipe", "device", "too large"])
def test_only_regular_files_of_some_size_are_read(folder, name, kind):
    path = folder / name
    path.unlink(missing_ok=True)
    match = r"Not a regular file|is missing|does not exist"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        match = r"Larger than|header of"
        with path.open("wb") as file:
            file.write(b"\xff" * 6 + b"\0\0" if name == "model.safetensors" else b" ")
            file.truncate(2**31)  # sparse: no disk is used
    if (kind, name) == ("too large", "model.safetensors"):
        match = "is cut off"
    with pytest.raises(CheckpointError, match=match):
        own_readers(folder)[name]()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "preprocessor_config.json",
             "chat_template.json", "model.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_source_has_only_regular_files(tmp_path, name, kind):
    source = hf.make(tmp_path / "s")
    (source / name).unlink()
    if kind == "pipe":
        os.mkfifo(source / name)
    else:
        (source / name).symlink_to("/dev/zero")
    if name == "generation_config.json":  # it is one of several places, and passed over
        convert_checkpoint(source, tmp_path / "out")
        return
    with pytest.raises(CheckpointError):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if name == "config.json":
        with pytest.raises(CheckpointError, match="Not a regular file"):
            resolve(source)


def test_a_tokenizer_of_our_own_source_that_is_a_pipe(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: Not a regular"):
        convert_checkpoint(folder, tmp_path / "out")


def test_the_doctor_waits_for_no_file(folder):
    os.mkfifo(folder / "pipe")
    sums = "0" * 64 + "  pipe\n" + "0" * 64 + "  a\0b\n"
    (folder / "SHA256SUMS").write_text(sums)
    (found,) = diagnose("x", folder)
    assert found.status == "broken"
    assert (
        "pipe cannot be read: Not a regular file; a\0b cannot be read: No file can have this name"
        in found.text
    )


def test_the_doctor_builds_no_network_of_a_million_layers(folder):
    change(folder / "config.json", "text", "num_hidden_layers", value="1000000")
    (found,) = diagnose("x", folder)
    assert "more layers than there are tensors" in found.text


# config.json


@pytest.mark.parametrize("value", [HUGE, f"-{HUGE}", "1e999", "NaN", "-Infinity", "9" * 5000])
@pytest.mark.parametrize(
    "keys", [("text", "rope_theta"), ("text", "hidden_size"), ("vision", "layer_norm_eps"),
             ("image", "mean", 0), ("image", "std", 1), ("eos_token_ids", 0), ("image_token_id",)],
)  # fmt: skip
def test_numbers_that_no_float_holds(folder, keys, value):
    change(folder / "config.json", *keys, value=value)
    with pytest.raises(CheckpointError, match=r"config|is not valid JSON: Exceeds"):
        read_config(folder)


@pytest.mark.parametrize("value", [HUGE, "1e999", "NaN"])
@pytest.mark.parametrize(
    ("name", "keys"),
    [("config.json", ("text_config", "rope_theta")), ("config.json", ("text_config", "vocab_size")),
     ("preprocessor_config.json", ("image_mean", 0)),
     ("preprocessor_config.json", ("image_std", 0)),
     ("preprocessor_config.json", ("size", "longest_edge"))],
)  # fmt: skip
def test_numbers_of_a_source_that_no_float_holds(tmp_path, name, keys, value):
    source = hf.make(tmp_path / "s")
    change(source / name, *keys, value=value)
    with pytest.raises(CheckpointError):
        plan_checkpoint(Source(source, "s"), ConvertOptions())


def test_no_message_quotes_all_of_a_value_of_a_source(tmp_path):
    source = hf.make(tmp_path / "s")
    for keys in (("model_type",), ("image_token_id",), ("quantization",), ("text_config",)):
        text = (source / "config.json").read_text()
        change(source / "config.json", *keys, value="[" * 900 + "]" * 900)
        with pytest.raises(CheckpointError) as error:
            plan_checkpoint(Source(source, "s"), ConvertOptions())
        assert len(str(error.value)) < 300
        (source / "config.json").write_text(text)


def test_a_long_integer_that_nobody_asks_for_is_passed_over(tmp_path):
    source = hf.make(tmp_path / "s")
    change(source / "config.json", "model_max_length", value=f"{10**30}")
    plan_checkpoint(Source(source, "s"), ConvertOptions())


@pytest.mark.parametrize(
    ("ids", "match"),
    [("[]", r"eos_token_ids is \(\); it needs one or more"),
     ("[640]", r"eos_token_ids is \(640,\); .*vocabulary of 640"), ("[-1]", "eos_token_ids is"),
     (str([1] * 10**5 + [10**6]), r"eos_token_ids is \(1, 1, 1, 1, 1, 1, \.\.\.\)")],
)  # fmt: skip
def test_end_tokens_are_of_the_vocabulary(folder, ids, match):
    change(folder / "config.json", "eos_token_ids", value=ids)
    with pytest.raises(CheckpointError, match=match):
        read_config(folder)


def test_a_source_is_not_too_long(folder):
    change(folder / "config.json", "source", value=json.dumps("x" * 1000))
    read_config(folder)
    change(folder / "config.json", "source", value=json.dumps("x" * 1001))
    with pytest.raises(CheckpointError, match=r"source has 1,001 characters; .* at most 1,000"):
        read_config(folder)


@pytest.mark.parametrize("scale", [0.0, 1e7])
def test_the_scale_of_an_adapter_has_a_range(scale):
    with pytest.raises(ValueError, match="must be above 0 and at most 1e\\+06"):
        AdapterConfig("x", (1.0,), 4, scale, 0.0, ())


@pytest.mark.parametrize(
    "value",
    [
        "[" * 900 + "]" * 900,
        "[" * 10**5,
        '"' + "x" * 10**5 + '"',
        f"[{'1, ' * 10**5} 1]",
        '{"' + "k" * 10**5 + '": 1}',
    ],
)
@pytest.mark.parametrize("keys", [("text", "rope_theta"), ("image", "mean"), ("source",)])
def test_no_message_quotes_all_of_a_value(folder, keys, value):
    change(folder / "config.json", *keys, value=value)
    with pytest.raises(CheckpointError) as error:
        read_config(folder)
    assert len(str(error.value)) < 600
    assert len(shorten("x" * 10**6)) < 200


def test_half_a_surrogate_pair_is_no_text(tmp_path, folder):
    change(folder / "config.json", "source", value='"\\ud800"')
    with pytest.raises(CheckpointError, match="holds half a surrogate pair"):
        read_config(folder)
    change(folder / "config.json", "source", value='"\\ud83d\\ude00"')
    assert read_config(folder).source == "😀"
    source = hf.make(tmp_path / "s")
    hf.write_json(source / "chat_template.json", {"chat_template": "{{ messages }}\ud800"})
    with pytest.raises(CheckpointError, match="holds half a surrogate pair"):
        plan_checkpoint(Source(source, "s"), ConvertOptions())


@pytest.mark.parametrize(
    ("key", "value"),
    [("scale", HUGE), ("scale", "NaN"), ("dropout", "1.0"), ("dropout", "-0.1"), ("rank", "0"),
     ("rank", f"{2**40}"), ("base", '"' + "x" * 2000 + '"'), ("base_signature", "[[[1]]]"),
     ("scale", "[" * 900 + "]" * 900)],
)  # fmt: skip
def test_an_adapter_with_impossible_settings(tmp_path, key, value):
    config = AdapterConfig("base", (1.0,), 4, 2.0, 0.0, ("text_model.layers.0.mlp.down_proj",))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert read_adapter_config(tmp_path) == config
    change(path, key, value=value)
    with pytest.raises(
        CheckpointError,
        match=r"(scale|dropout|rank|base|base_signature|modules) .*train the adapter again",
    ):
        read_adapter_config(tmp_path)


def test_an_origin_that_is_nested_is_quoted_in_short(tmp_path):
    (tmp_path / "origin.json").write_text('{"source": ' + "[" * 900 + "]" * 900 + "}")
    with pytest.raises(CheckpointError, match=r"source must be a text, not \[\[\[\.\.\.\]\]\];"):
        read_origin(tmp_path)


# tokenizer.json

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BAD = {
    "an id of 2**31": (lambda v: v["model"]["vocab"].update(Which=2**31), f"token id {2**31} and"),
    "an id too many": (lambda v: v["model"]["vocab"].update(Which=640), "token id 640 and"),
    "an id twice": (lambda v: v["model"]["vocab"].update(Which=3), "has the same token id twice"),
    "an id of text": (lambda v: v["model"]["vocab"].update(Which="3"), "token id '3' and"),
    "an added id": (lambda v: v["added_tokens"][3].update(id=2**31), "list of added tokens has"),
    "an added id twice": (lambda v: v["added_tokens"][3].update(id=638), "the same token id twice"),
    "no id": (lambda v: v["added_tokens"][3].pop("id"), "token id None"),
    "an empty token": (lambda v: v["added_tokens"][3].update(content=""), "an empty token"),
    "a token twice": (lambda v: v["added_tokens"].append(v["added_tokens"][0]), "same token twice"),
    "many tokens": (lambda v: v.update(added_tokens=[{}] * 10**4), "at most 8192"),
    "another model": (lambda v: v.update(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "BPE"),
    "a list": (lambda v: v["model"].update(vocab=[["a", 0]]), "must be BPE"),
    "chance": (lambda v: v["model"].update(dropout=0.5), "dropout is 0.5"),
    "a sequence of nothing": (lambda v: v.update(decoder="Sequence"), "has no settings"),
    "a prefix": (lambda v: v["model"].update(continuing_subword_prefix="##"), "must be null"),
    "a map": (lambda v: v.update(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
              "normalizer is of type 'Precompiled'"),
    "a replacement": (lambda v: v.update(normalizer={"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}]}), "'Replace'"),
    "no length": (lambda v: v.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "Fixed"),
    "hidden by a list": (lambda v: v.update(pre_tokenizer={"type": "Sequence", "normalizers": [],
        "pretokenizers": [{"type": "FixedLength", "length": 0}]}), "Fixed"),
    "a decoder": (lambda v: v.update(decoder={"type": "Strip", "content": "a", "start": 10**9,
                                              "stop": 5}), "decoder is of type 'Strip'"),
    "a slow pattern": (lambda v: v.update(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(a+)+$"}}),
                       "can take forever"),
    "nothing": (lambda v: v.update(model=5), "it has no model"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_tokenizer_that_no_model_has(folder, name):
    damage, match = BAD[name]
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"is not a tokenizer: .*{match}"):
        builder_of(folder)


def test_a_key_twice_is_refused(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"vocab"', '"vocab": {"a": 4000000000}, "vocab"'))
    with pytest.raises(CheckpointError, match="a key stands twice"):
        builder_of(folder)


def test_patterns_of_published_tokenizers_are_read(folder):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    split = {**SPLIT, "pattern": {"Regex": pattern}}
    values["pre_tokenizer"]["pretokenizers"] = [
        split,
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    path.write_text(json.dumps(values))
    message = {"role": "user", "content": "What is this, 1234?"}
    assert builder_of(folder).build([message], []).size > 5


def test_a_token_of_white_space_that_takes_more_of_it(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"][5] |= {"content": " \t", "lstrip": True, "special": False}
    path.write_text(json.dumps(values))
    builder = builder_of(folder)
    builder.build([{"role": "user", "content": "a   \t b"}], [])


def test_panics_of_the_native_reader_are_errors(capfd):
    from tokenizers import Tokenizer

    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    model = {"type": "BPE", "vocab": {}, "merges": []}
    values = {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "model": model}
    with (
        pytest.raises(PromptError, match=r"cannot read it: .*charsmap"),
        convert_native_errors(PromptError, "cannot read it"),
    ):
        Tokenizer.from_str(json.dumps(values))
    capfd.readouterr()  # what Rust says of it
    with pytest.raises(KeyboardInterrupt), convert_native_errors(PromptError, "cannot read it"):
        raise KeyboardInterrupt


# All at once

FRAGMENTS = (
    "{% for a in range(9999) %}", "{% endfor %}", "{{ 'a' * 10**10 }}", "{{ messages }}", "}}",
    "{% set x = x ~ x %}", "{{ '\\ud800' }}", "{% macro f() %}", "{{ f() }}", "| center(10**9)",
    "{{ messages * 10000 }}", "{% if ", "**9**9", "{{ raise_exception('\x1b' * 9999) }}",
)  # fmt: skip
VALUES = (
    "0", "-1", "1", "2147483648", "9223372036854775808", HUGE, "1e999", "NaN", "0.5", '""', '"a"',
    '"\\ud800"', '"\\u001b]52"', "true", "null", "[]", "{}", "[64]", "[" * 900 + "]" * 900,
    '{"type": "Precompiled"}', '{"bits": 99, "group_size": 9223372036854775807, "mode": "x"}',
)  # fmt: skip


def mutated(chance: random.Random, name: str, text: str) -> bytes:
    """The content `text` of the file `name`, damaged."""
    if chance.random() < 0.25:
        data = bytearray(text.encode())
        place, length = chance.randrange(len(data)), chance.choice((0, 1, 9, 10**6))
        data[place : place + length] = chance.randbytes(chance.choice((0, 1, 4)))
        return bytes(data)
    if name.endswith(".jinja"):
        place = chance.randrange(len(text))
        return (text[:place] + chance.choice(FRAGMENTS) + text[place:]).encode()
    values = place = json.loads(text)
    while True:
        key = chance.choice([*place] if isinstance(place, dict) else range(len(place)))
        if not place[key] or not isinstance(place[key], dict | list) or chance.random() < 0.2:
            break
        place = place[key]
    if chance.random() < 0.2:
        del place[key]
    else:
        place[key] = "@@"
    return json.dumps(values).replace('"@@"', chance.choice(VALUES)).encode()


def test_damaged_files_are_refused_or_used(folder):
    """90 damaged files, of which all that is no error of ours fails the test."""
    chance, refused, longest = random.Random(0), 0, 0
    names = ("config.json", "tokenizer.json", "chat_template.jinja")
    texts = {name: (folder / name).read_text() for name in names}
    for number in range(90):
        name = names[number % 3]
        (folder / name).write_bytes(mutated(chance, name, texts[name]))
        try:
            config = read_config(folder)
            build_checked_model(config, read_headers(folder))
            builder = builder_of(folder)
            builder.build([{"role": "user", "content": "Hi 12 <image>"}], [])
            Constrainer(builder)(Sampling(regex="[a-z]+"))
        except SmolVLMError as error:
            refused += 1
            longest = max(longest, len(str(error)))
        except Exception as error:
            pytest.fail(f"{number}, {name}: {type(error).__name__}: {error}")
        (folder / name).write_text(texts[name])
    assert 60 < refused < 90
    assert longest < 2000
