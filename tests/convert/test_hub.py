"""What a user calls a model leads to one folder of ours, converted once."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

import mlx_smolvlm
from mlx_smolvlm.checkpoint.load import load_model, read_config
from mlx_smolvlm.convert import hub
from mlx_smolvlm.convert import source as convert_source
from mlx_smolvlm.convert.fit import estimate_answer
from mlx_smolvlm.convert.hub import ResolveOptions, resolve
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint, plan_checkpoint
from mlx_smolvlm.convert.source import open_source
from mlx_smolvlm.errors import CheckpointError, SmolVLMWarning
from mlx_smolvlm.generate import memory_plan
from mlx_smolvlm.generate.memory_plan import Machine
from tests.helpers import hf_folder as hf

REPO = "HuggingFaceTB/SmolVLM-256M-Instruct"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of ours, and an empty one of the hub's."""
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> list[tuple]:
    """The downloads from the hub, which has revision aaaa..., or any other, of any model.

    One that must not ask the network is no download, and finds what came before.
    """
    calls = []

    def snapshot(repo, offline=False, revision=None):
        folder = tmp_path / "snapshots" / (revision or "a" * 40)
        if offline and not folder.exists():
            raise CheckpointError("not fetched yet")
        if not offline:
            calls.append((repo, offline, revision))
        return folder if folder.exists() else hf.make(folder)

    monkeypatch.setattr(convert_source, "download", snapshot)
    return calls


def test_a_folder_of_ours_is_taken_as_it_is(tmp_path, cache):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    assert resolve(out, ResolveOptions(bits=4)) == out
    assert resolve(str(out)) == out
    assert not cache.exists()


def test_demo_is_the_bundled_folder():
    assert resolve("demo") == Path(mlx_smolvlm.__file__).parent / "demo"


def test_a_local_folder_is_converted_once_per_precision(tmp_path, cache):
    source = hf.make(tmp_path / "my model")
    calls = []
    options = ResolveOptions(progress=lambda *call: calls.append(call))
    first = resolve(source, options)
    assert calls
    count = len(calls)
    assert resolve(source, options) == resolve(str(source), options) == first
    assert len(calls) == count
    load_model(first)
    four = resolve(source, ResolveOptions(bits=4))
    half = resolve(source, ResolveOptions(dtype="bfloat16"))
    assert len({first, four, half}) == 3
    assert read_config(four).quantization.text.bits == 4
    assert read_config(half).dtype == "bfloat16"
    assert first.parent.parent == cache
    assert "my model" in first.parent.name


def test_a_local_folder_that_changes_is_converted_again_and_the_old_goes(tmp_path):
    source = hf.make(tmp_path / "s")
    old, four = resolve(source), resolve(source, ResolveOptions(bits=4))
    hf.write_json(source / "generation_config.json", {"eos_token_id": 62})
    new = resolve(source)
    assert new != old
    assert read_config(new).eos_token_ids == (62, 61)
    assert not old.exists()
    assert four.exists()


def test_two_folders_of_one_name_are_kept_apart(tmp_path):
    one, two = hf.make(tmp_path / "a" / "s"), hf.make(tmp_path / "b" / "s")
    first, second = resolve(one), resolve(two)
    assert first != second
    assert first.exists()


def test_a_damaged_conversion_is_made_again(tmp_path):
    source = hf.make(tmp_path / "s")
    folder = resolve(source)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert resolve(source) == folder
    load_model(folder)
    (folder / "config.json").write_text("{}")
    assert resolve(source) == folder
    load_model(folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink()
        assert resolve(source) == folder
        assert (folder / name).is_file()


def test_an_alias_is_fetched_once_and_then_found_without_the_network(cache, downloads):
    folder = resolve("SmolVLM-256M")
    assert folder == cache / "HuggingFaceTB--SmolVLM-256M-Instruct" / "aaaaaaaaaaaa-source-v2"
    assert read_config(folder).source == REPO
    assert resolve(REPO) == resolve("smolvlm-256m", ResolveOptions(offline=True)) == folder
    assert downloads == [(REPO, False, None)]
    assert resolve(REPO, ResolveOptions(bits=4)) == folder.with_name("aaaaaaaaaaaa-4bit-v2")
    assert len(downloads) == 2


def test_a_revision_is_its_own_conversion(downloads):
    first, other = resolve("owner/name"), resolve(f"owner/name@{'b' * 40}")
    assert (first.name[:12], other.name[:12]) == ("a" * 12, "b" * 12)
    assert resolve(f"owner/name@{'b' * 40}") == other
    assert downloads == [("owner/name", False, None), ("owner/name", False, "b" * 40)]
    assert read_config(other).source == "owner/name"


def test_a_plain_name_is_not_a_revision_that_was_used_before(downloads):
    old = resolve("owner/name@old")
    plain = resolve("owner/name")
    assert (old.name[:3], plain.name[:12]) == ("old", "a" * 12)
    assert resolve("owner/name") == plain
    assert resolve("owner/name@old") == old
    assert downloads == [("owner/name", False, "old"), ("owner/name", False, None)]


def test_a_tag_like_the_beginning_of_a_commit_is_another_revision(downloads):
    commit = resolve(f"owner/name@{'cafe' * 10}")
    assert resolve("owner/name@cafe") != commit
    assert resolve(f"owner/name@{'cafe' * 10}") == commit
    assert len(downloads) == 2


def test_two_names_of_one_commit_are_one_conversion(downloads):
    plain = resolve("owner/name")
    assert resolve(f"owner/name@{'a' * 40}") == plain
    assert resolve("owner/name", ResolveOptions(offline=True)) == plain
    assert len(downloads) == 1


def test_our_format_on_the_hub_is_used_where_it_lies_and_asked_for_once(tmp_path, cache, downloads):
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    made = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "made")
    snapshot.parent.mkdir()
    made.rename(snapshot)
    later = (snapshot / "model.safetensors").rename(tmp_path / "later")
    assert resolve("owner/ours") == snapshot  # the hub would have fetched the rest
    assert downloads == [("owner/ours", False, None)]
    downloads.clear()
    later.rename(snapshot / "model.safetensors")
    assert resolve("owner/ours") == snapshot
    assert resolve("owner/ours", ResolveOptions(bits=4)) == snapshot  # as of a local folder
    assert downloads == []
    assert list(cache.iterdir()) == []


def test_every_alias_is_a_hub_id():
    assert len(hub.ALIASES) == 8
    assert all(convert_source.is_hub_id(repo) for repo in hub.ALIASES.values())


@pytest.mark.parametrize("name", ["smolvlm-9b", "no/such/folder", "/absent", "owner/", "a b/c", ""])
def test_an_unknown_model_is_named_with_what_there_is(name, cache):
    with pytest.raises(CheckpointError, match=r"there is no model .*smolvlm-256m") as error:
        resolve(name, ResolveOptions(offline=True))
    assert f"'{name}'" in str(error.value)
    assert not cache.exists()


def test_offline_and_not_cached_is_one_line(cache):
    with pytest.raises(CheckpointError) as error:
        resolve("smolvlm-256m", ResolveOptions(offline=True))
    assert str(error.value) == f"{REPO}: it is not in the local cache, and offline was asked for"
    assert list(cache.iterdir()) == []


def hub_error(kind: str) -> Exception:
    """An error of the hub's client, built without a response."""
    from huggingface_hub import errors

    return getattr(errors, kind).__new__(getattr(errors, kind))


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("GatedRepoError", "its owner asks for a login"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "no revision"),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
        ("HFValidationError", "not a valid repository id"),
        ("HfHubHTTPError", "the download failed"),
    ],
)
def test_each_failure_of_the_hub_is_one_line(monkeypatch, kind, match):
    def fail(*_args, **_kwargs):
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=f"{REPO}: .*{match}") as error:
        resolve(REPO)
    assert "\n" not in str(error.value)


def test_only_the_files_that_are_needed_are_fetched(monkeypatch, tmp_path):
    seen = {}

    def snapshot(repo, **options):
        seen.update(options, repo=repo)
        return str(hf.make(tmp_path / "c0ffee"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    resolve(REPO, ResolveOptions(offline=True))
    assert set(seen["allow_patterns"]) == {
        *("*.json", "*.safetensors", "*.jinja", "*.txt", "README.md", "SHA256SUMS")
    }
    assert (seen["repo"], seen["local_files_only"], seen["revision"]) == (REPO, True, None)


def test_a_failed_conversion_leaves_the_cache_empty(tmp_path, cache):
    source = hf.make(tmp_path / "s", hf.settings(model_type="llava"), {})
    with pytest.raises(CheckpointError, match="s is a llava checkpoint"):
        resolve(source)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="MLX_SMOLVLM_CACHE"):
        resolve(hf.make(tmp_path / "s"))


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert hub.find_cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MLX_SMOLVLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.find_cache_folder() == tmp_path / "xdg" / "mlx-smolvlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hub.find_cache_folder() == tmp_path / "home" / ".cache" / "mlx-smolvlm"


RESOLVE = """
    import sys
    from mlx_smolvlm.convert.hub import ResolveOptions, resolve
    print("ready", flush=True)
    sys.stdin.readline()
    calls = []
    print(resolve(sys.argv[1], ResolveOptions(progress=lambda *call: calls.append(call))))
    print(len(calls))
"""


def test_two_processes_convert_once_between_them(tmp_path):
    source = hf.make(tmp_path / "s")
    command = [sys.executable, "-c", textwrap.dedent(RESOLVE), str(source)]
    pair = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in pair:
        assert process.stdout.readline() == "ready\n"
    for process in pair:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[0].split("\n") for process in pair]
    assert said[0][0] == said[1][0] == str(resolve(source))
    assert sorted(int(lines[1]) > 0 for lines in said) == [False, True]


def test_the_converter_is_not_imported_for_a_folder_of_ours(tmp_path):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    code = (
        "import sys; from mlx_smolvlm.convert.hub import resolve; resolve(sys.argv[1]);"
        "names = ('huggingface_hub', 'mlx_smolvlm.convert.');"
        "print([name for name in sys.modules if name.startswith(names)])"
    )
    run = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True)
    assert run.stdout == "['mlx_smolvlm.convert.hub']\n", run.stderr


# Precision by memory


def make_machine(folder: Path, bits: int) -> Machine:
    """A machine with just enough memory for the source in `folder` at `bits`."""
    config = plan_checkpoint(open_source(folder), ConvertOptions()).config
    return replace(PLENTY, memory=2 * estimate_answer(config, bits, PLENTY))


PLENTY = Machine("mlx-gpu", 2, 2**40)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_takes_half_of_the_memory_is_converted_to_fewer_bits(tmp_path, bits):
    source = hf.make(tmp_path / "s")
    machine = make_machine(source, bits)
    with pytest.warns(SmolVLMWarning, match=rf"^s is converted to {bits} bits, since .*--bits 16"):
        folder = resolve(source, ResolveOptions(machine=machine))
    assert read_config(folder).quantization.text.bits == bits
    assert folder == resolve(source, ResolveOptions(bits=bits))
    assert resolve(source, ResolveOptions(machine=machine)) == folder  # without a warning
    assert read_config(resolve(source, ResolveOptions(bits=16))).quantization.text is None
    plenty = resolve(source, ResolveOptions(machine=PLENTY))
    assert read_config(plenty).quantization.text is None
    assert resolve(source, ResolveOptions(machine=machine)) == plenty  # as it is there


def test_a_precision_chosen_by_memory_is_found_without_the_network(tmp_path, downloads):
    machine = make_machine(hf.make(tmp_path / "s"), 8)
    with pytest.warns(SmolVLMWarning, match=f"^{REPO} is converted to 8 bits"):
        folder = resolve(REPO, ResolveOptions(machine=machine))
    assert folder.name == "aaaaaaaaaaaa-8bit-v2"
    assert resolve("smolvlm-256m", ResolveOptions(machine=machine, offline=True)) == folder
    assert len(downloads) == 1
    plenty = resolve(REPO, ResolveOptions(machine=PLENTY))  # 8 bits are not what it asks for
    assert plenty.name == "aaaaaaaaaaaa-source-v2"


def test_what_is_converted_already_stays_so_however_little_memory_there_is(tmp_path):
    machine = replace(PLENTY, memory=1)
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    for model in (out, "demo"):
        assert resolve(model, ResolveOptions(machine=machine)) == resolve(model)


def test_load_takes_the_memory_of_this_machine(tmp_path, monkeypatch):
    source = hf.make_askable(tmp_path / "s")
    monkeypatch.setattr(memory_plan, "measure_machine", lambda: 2**27)
    with pytest.warns(SmolVLMWarning, match="is converted to 4 bits"):
        vlm = mlx_smolvlm.load(source)
    assert vlm.config.quantization.text.bits == 4
