"""The mutations of tests/mutation_lists can be made, and their runner tells survivors."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests import mutations as runner


def test_every_mutation_can_be_made() -> None:
    mutations, sources = runner.read_mutations(), runner.Sources()
    assert len(mutations) >= 80
    stale = []
    for one in mutations:
        try:
            sources.mutate(one)
            sources.node_ids(one)
        except runner.StaleError as error:
            stale.append(f"{one.group}/{one.name}: {error}")
    assert not stale, "\n".join(stale)


SOURCE = """\
def double(x):
    return 2 * x


class Counter:
    def add(self, number):
        return number + 1
"""
TESTS = """\
import toy


def test_double():
    assert toy.double(3) == 6


def test_counter():
    assert toy.Counter().add(1)


def test_wrong():
    assert toy.double(0) == 1
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a module, its tests, and a file that git does not know."""
    root = tmp_path / "toy"
    (root / "cli").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "cli" / "toy.py").write_text(SOURCE)
    (root / "tests" / "test_toy.py").write_text(TESTS)
    (root / "pytest.ini").write_text("[pytest]\npythonpath = cli\n")
    (root / ".gitignore").write_text("ignored\n")
    (root / "ignored").write_text("")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a third of a second a run
    return root


DOUBLE = runner.Mutation(
    "double", "toy", "It trebles", "double", "2 * x", "3 * x", ("test_toy.py::test_double",)
)


def test_a_survivor_is_told_from_what_is_caught(toy: Path, tmp_path: Path) -> None:
    mutations = [
        DOUBLE,
        replace(DOUBLE, name="survivor", symbol="Counter.add", old="1", new="2",
                tests=("test_counter",)),
        replace(DOUBLE, name="stale", old="4 * x"),
        replace(DOUBLE, name="broken", tests=("test_wrong",)),
    ]  # fmt: skip
    verdicts = list(runner.Hunt(toy, tmp_path / "copies").run(mutations))
    assert {one.mutation.name: one.result for one in verdicts} == {
        "double": "caught",
        "survivor": "SURVIVED",
        "stale": "STALE",
        "broken": "BROKEN",
    }
    reasons = {one.mutation.name: one.reason for one in verdicts}
    assert reasons["double"] == "`test_double`"
    assert "'4 * x'" in reasons["stale"]
    assert "test_wrong" in reasons["broken"]
    copy = tmp_path / "copies" / "0"
    assert (copy / "cli" / "toy.py").read_text() == SOURCE  # put back
    assert not (copy / "ignored").exists()


def test_a_hang_is_ended(toy: Path, tmp_path: Path) -> None:
    copy = runner.Copy(toy, tmp_path / "copy")
    with copy.changed(Path("tests/test_toy.py"), "while True: pass"):
        run = copy.test(["tests/test_toy.py"], (), timeout_s=0.2)
    assert run.seconds is None
    assert run.status < 0


def test_a_symbol_is_found_wherever_it_is_defined(toy: Path) -> None:
    (toy / "cli" / "toy.py").rename(toy / "cli" / "moved.py")
    path, text = runner.Sources(toy).mutate(DOUBLE)
    assert path == Path("cli/moved.py")
    assert text == SOURCE.replace("2 * x", "3 * x")
    os.makedirs(toy / "train")
    (toy / "train" / "other.py").write_text("def double(x):\n    return 2 * x\n")
    with pytest.raises(runner.StaleError, match=r"moved\.py.*other\.py|other\.py.*moved\.py"):
        runner.Sources(toy).mutate(DOUBLE)
    by_path = replace(DOUBLE, symbol="train/other:double")
    assert runner.Sources(toy).mutate(by_path)[0] == Path("train/other.py")
    (toy / "train" / "other.py").write_text("def double(x):\n    return x + x\n")
    assert runner.Sources(toy).mutate(DOUBLE)[0] == Path("cli/moved.py")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"symbol": "treble"}, "there is no treble"),
        ({"old": "x"}, "has 'x' 2 times"),
        ({"new": "2 * "}, "does not compile"),
        ({"tests": ("test_treble",)}, "test_treble is in no file"),
        ({"tests": ()}, "names no tests"),
    ],
)
def test_what_cannot_be_made_is_named(toy: Path, changes: dict[str, object], words: str) -> None:
    sources, mutation = runner.Sources(toy), replace(DOUBLE, **changes)
    make = sources.node_ids if "tests" in changes else sources.mutate
    with pytest.raises(runner.StaleError, match=words):
        make(mutation)


def test_names_choose_mutations_lists_and_patterns() -> None:
    mutations = [DOUBLE, replace(DOUBLE, name="dozen", group="other")]
    assert runner.choose(mutations, []) == mutations
    assert runner.choose(mutations, ["other", "double"]) == mutations[::-1]
    assert runner.choose(mutations, ["do*"]) == mutations
    with pytest.raises(SystemExit, match="treble"):
        runner.choose(mutations, ["treble"])


def test_a_list_that_cannot_be_used(tmp_path: Path) -> None:
    entry = '[one]\nmistake = "m"\nsymbol = "s"\nold = "a"\nnew = "b"\ntests = ["t"]\n'
    (tmp_path / "first.toml").write_text(entry)
    assert [one.name for one in runner.read_mutations(tmp_path)] == ["one"]
    (tmp_path / "second.toml").write_text(entry)
    with pytest.raises(ValueError, match="one is in first too"):
        runner.read_mutations(tmp_path)
    (tmp_path / "second.toml").write_text(entry.replace("[one]", "[two]").replace("old", "odl"))
    with pytest.raises(ValueError, match=r"second\.toml, two"):
        runner.read_mutations(tmp_path)
