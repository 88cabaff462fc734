"""`make` finds a Python of 3.11 or newer, uses uv where it is there, or says what to install."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
TOOLS = ("rm", "touch", "mkdir", "cp", "cat", "sh")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

# A Python of another version: it runs `-c` code, and writes down everything else.
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then
    exec {real} -I -S -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
fi
if [ "$1" = --version ]; then echo "Python {name}"; exit; fi
echo "{name} $*" >> "$LOG"
if [ "$2" = venv ]; then
    [ -z "$NO_VENV" ] || {{ mkdir -p .venv/bin; touch .venv/bin/python; exit 1; }}
    {fill}
fi
"""
UV = """#!/bin/sh
echo "uv $*" >> "$LOG"
if [ "$1" = venv ]; then
    {fill}
fi
"""
# What both leave in .venv/bin, of which python notes what it is asked, as the command does.
FILL = """mkdir -p .venv/bin
    cp "$STUBS/noting" .venv/bin/python; cp "$STUBS/noting" .venv/bin/mlx-smolvlm"""
NOTING = """#!/bin/sh
echo "$0 $*" >> "$LOG"
"""


class Machine:
    """A copy of the Makefile, on a machine with nothing but what is added."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.log = folder / "clone", folder / "bin", folder / "log"
        self.root.mkdir()
        self.bin.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name) or name)
        (folder / "stubs").mkdir()
        self._write(folder / "stubs" / "noting", NOTING)
        self.env = {"PATH": str(self.bin), "LOG": str(self.log), "STUBS": str(folder / "stubs")}

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def add_python(self, name: str, *version: int) -> None:
        text = PYTHON.format(real=sys.executable, version=version, name=name, fill=FILL)
        self._write(self.bin / name, text)

    def add_uv(self) -> None:
        self._write(self.bin / "uv", UV.format(fill=FILL))

    def make(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(MAKE), *arguments],
            cwd=self.root,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def read_log(self) -> list[str]:
        """What was run, in this order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.replace(f"{self.bin}{os.sep}", "") for line in lines]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


QUESTION = ".venv/bin/mlx-smolvlm chat -m demo --image examples/three.png What is in this picture?"
PIP = ".venv/bin/python -m pip install --quiet --disable-pip-version-check --editable"


def test_the_newest_python_makes_the_environment(machine: Machine) -> None:
    machine.add_python("python3", 3, 9, 6)  # as macOS has it
    machine.add_python("python3.11", 3, 11, 2)
    machine.add_python("python3.13", 3, 13, 0)
    done = machine.make("demo")
    assert done.returncode == 0, done.stderr
    assert machine.read_log() == ["python3.13 -m venv --clear .venv", f"{PIP} .", QUESTION]
    assert "Next: source .venv/bin/activate\n" in done.stderr
    assert machine.make("demo").returncode == 0  # nothing is installed twice
    assert machine.read_log()[3:] == [QUESTION]


def test_a_name_without_a_python_behind_it_is_passed_over(machine: Machine) -> None:
    machine._write(machine.bin / "python3.14", "#!/bin/sh\necho not found >&2; exit 127\n")  # pyenv
    machine.add_python("python3", 3, 12, 1)
    assert machine.make("demo").returncode == 0
    assert machine.read_log()[0] == "python3 -m venv --clear .venv"


def test_a_python_can_be_named(machine: Machine) -> None:
    machine.add_python("python3.13", 3, 13, 0)
    machine.add_python("mine", 3, 12, 0)
    assert machine.make("demo", f"PYTHON={machine.bin}/mine").returncode == 0
    assert machine.read_log()[0] == "mine -m venv --clear .venv"


def test_a_python_can_be_named_by_the_environment(machine: Machine) -> None:
    """As CI does, which tests one version after the other."""
    machine.add_python("python3.13", 3, 13, 0)
    machine.add_python("python3", 3, 11, 0)
    assert machine.make("demo", PYTHON="python3").returncode == 0
    assert machine.read_log()[0] == "python3 -m venv --clear .venv"
    assert re.search(r"^ *PYTHON: python3\b", (ROOT / ".github/workflows/ci.yml").read_text(), re.M)
    assert 'export PYTHON="${PYTHON:-python3}"' in (ROOT / ".ci" / "run").read_text()


def test_uv_is_used_with_the_python_that_was_found(machine: Machine) -> None:
    machine.add_python("python3", 3, 9, 6)
    machine.add_python("python3.12", 3, 12, 1)
    machine.add_uv()
    assert machine.make("demo").returncode == 0
    assert machine.read_log() == [
        "uv venv --quiet --clear --seed --python python3.12 .venv",
        "uv pip install --quiet --python .venv/bin/python --editable .",
        QUESTION,
    ]


def test_uv_fetches_a_python_if_there_is_none(machine: Machine) -> None:
    machine.add_python("python3", 3, 10, 14)
    machine.add_uv()
    assert machine.make("demo").returncode == 0
    assert machine.read_log()[0] == "uv venv --quiet --clear --seed --python >=3.11 .venv"


@pytest.mark.parametrize("version", [(3, 9, 6), None])
def test_without_either_it_says_what_to_install(
    machine: Machine, version: tuple[int, ...] | None
) -> None:
    if version:
        machine.add_python("python3", *version)
    done = machine.make("demo")
    assert done.returncode != 0
    assert "error: mlx-smolvlm needs Python 3.11 or newer" in done.stderr
    assert f"; python3 is {'Python python3' if version else 'missing'}\n" in done.stderr
    assert "brew install python@3.13" in done.stderr
    assert "https://docs.astral.sh/uv/" in done.stderr
    assert machine.read_log() == []
    assert not (machine.root / ".venv").exists()


def test_a_python_that_cannot_make_environments_leaves_none(machine: Machine) -> None:
    machine.add_python("python3", 3, 11, 2)  # Debian's, without python3-venv
    assert machine.make("demo", NO_VENV="1").returncode != 0
    assert not (machine.root / ".venv").exists()
    assert machine.make("demo").returncode == 0  # once it was installed


def test_the_tests_run_in_the_environment(machine: Machine) -> None:
    machine.add_python("python3", 3, 11, 2)
    done = machine.make("test")
    assert done.returncode == 0, done.stderr
    *_, dev, tests = machine.read_log()
    assert dev == f"{PIP} .[dev]"
    assert tests.startswith(".venv/bin/python -m pytest ")
