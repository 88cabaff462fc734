"""Which model answers without -m, and what is said about it and about the demo."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_smolvlm.cli import load as model_choice
from mlx_smolvlm.convert import hub
from mlx_smolvlm.convert.hub import ALIASES, ResolveOptions, find_last_used, resolve
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from tests.helpers import command, hf_folder

NOTICE = (
    "the demo knows drawn shapes, print, charts and pages only; photographs: "
    "mlx-smolvlm chat -m smolvlm2-500m (2.0 GB download, "
)
HELLO = "Hello! Show me a picture or a short video and ask about it.\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_source(folder: Path) -> Path:
    """A checkpoint of Hugging Face's format that takes any question."""
    return hf_folder.make_askable(folder)


def use_at(folder: Path, second: int) -> None:
    """Let a conversion be one that was used at `second`."""
    os.utime(folder / ".last-used", (second, second))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The finished command, with the cache of the test."""
    return command.run_text(*arguments, env={"MLX_SMOLVLM_CACHE": os.environ["MLX_SMOLVLM_CACHE"]})


# The demo


@pytest.mark.parametrize("option", [(), ("-m", "demo")])
def test_the_demo_says_what_it_knows_in_one_line_on_stderr(
    cache: Path, option: tuple[str, ...]
) -> None:
    result = run("chat", "Hi", *option)
    assert (result.returncode, result.stdout) == (0, HELLO)
    assert result.stderr.startswith(NOTICE)
    assert result.stderr.endswith(" GB memory)\n")
    assert result.stderr.count("\n") == 1
    as_json = run("chat", "Hi", "--json", *option)
    assert json.loads(as_json.stdout)["text"] + "\n" == HELLO
    assert as_json.stderr == result.stderr
    chosen = run("choose", "Hi", "-c", "Hello!", "-c", "No.", *option)
    assert (chosen.returncode, chosen.stderr) == (0, result.stderr)


def test_a_conversion_of_the_demo_says_so_too(cache: Path, tmp_path: Path) -> None:
    folder = convert_checkpoint(resolve("demo"), tmp_path / "small", ConvertOptions(bits=4))
    assert run("chat", "Hi", "-m", folder).stderr.startswith(NOTICE)


def test_an_evaluation_of_the_demo_does_not(cache: Path, tmp_path: Path) -> None:
    row = {"question": "Hi", "answer": HELLO.strip()}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    result = run("eval", "demo", tmp_path / "data.jsonl", "--results", tmp_path / "out.jsonl")
    assert result.returncode == 0
    assert "the demo knows" not in result.stderr


def test_load_warns_once_a_process_of_the_demo_alone(tiny_folder: Path) -> None:
    code = (
        "import sys, mlx_smolvlm as s; s.load(sys.argv[1]); print('-', file=sys.stderr);"
        "s.load(); s.load('demo'); s.load()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, tiny_folder], capture_output=True, text=True
    )
    before, after = done.stderr.split("-\n", 1)
    assert (done.returncode, before) == (0, "")
    assert after.count("the demo knows") == 1
    assert after.startswith("<string>:1: SmolVLMWarning: the demo knows ")
    assert 'photographs: load("smolvlm2-500m") (2.0 GB download, ' in after


# The model used last


def test_without_m_the_model_used_last_answers_and_is_named(cache: Path, tmp_path: Path) -> None:
    first, second = make_source(tmp_path / "First"), make_source(tmp_path / "Second")
    one, two = resolve(first), resolve(second, ResolveOptions(bits=4))
    use_at(one, 1000), use_at(two, 2000)
    arguments = ("chat", "Hi", "--max-tokens", "3")
    said = "Second at 4 bits, the model used last (-m takes another, -m demo the demo)\n"
    for _ in range(2):  # and then it is again the one used last
        result = run(*arguments)
        assert (result.returncode, result.stderr) == (0, said)
        assert result.stdout == run(*arguments, "-m", two).stdout
    assert run(*arguments, "-m", first).stderr == ""
    result = run(*arguments)
    assert result.stderr.startswith("First at 16 bits, the model used last ")
    assert run("choose", "Hi", "-c", "a", "-c", "b").stderr == result.stderr
    assert run(*arguments, "-m", "demo").stderr.startswith(NOTICE)


def test_damaged_and_foreign_models_do_not_count(
    cache: Path, tmp_path: Path, give_away: Callable[[Path], None]
) -> None:
    folders = [resolve(make_source(tmp_path / name)) for name in "abcd"]
    for second, folder in enumerate(folders):
        use_at(folder, 1000 * second)
    whole, damaged, hidden, foreign = folders
    hidden.rename(hidden.with_name(f".{hidden.name}.1234.partial"))
    (damaged / "tokenizer.json").unlink()
    if os.getuid() == 0:
        give_away(foreign)
        assert find_last_used() == whole
    give_away(whole)
    assert find_last_used() is None
    assert damaged.exists()
    assert run("chat", "Hi").stdout == HELLO


def test_of_models_used_at_the_same_time_the_first_by_name_is_taken(
    cache: Path, tmp_path: Path
) -> None:
    folders = [resolve(make_source(tmp_path / name)) for name in "cab"]
    for folder in folders:
        use_at(folder, 1000)
    assert find_last_used() == min(folders)


def test_a_cache_that_cannot_be_read_leaves_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "none", "bad\0name"):
        monkeypatch.setattr(hub, "find_cache_folder", lambda path=path: Path(path))
        assert model_choice.choose_model(None) == "demo"


def test_bits_apply_to_the_model_of_the_hub_used_last(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repo = ALIASES["smolvlm2-256m"]
    local = resolve(make_source(tmp_path / "mine"))
    remote = cache / repo.replace("/", "--") / "abc-source-v2"
    remote.parent.mkdir()
    local.rename(remote)
    config = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(json.dumps({**config, "source": repo}))
    for bits, model, words in (
        (None, str(remote), "smolvlm2-256m at 16 bits, "),
        (16, str(remote), "smolvlm2-256m at 16 bits, "),
        (4, repo, "smolvlm2-256m at 4 bits, "),
    ):
        assert model_choice.choose_model(bits) == model
        assert capsys.readouterr().err.startswith(words)
    (remote / "config.json").write_text(json.dumps({**config, "source": "mine"}))
    assert model_choice.choose_model(4) == str(remote)  # its source is not known
    assert capsys.readouterr().err.startswith("mine at 16 bits, ")
