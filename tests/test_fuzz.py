"""The fuzzing command: a short run of every kind, and that it notices each kind of failure."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_a_few_files_of_every_kind() -> None:
    command = [sys.executable, str(TESTS / "fuzz.py"), "--files", "12"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 failed" in run.stdout.splitlines()[-1]


KINDS = """
import os, signal, time
from mlx_smolvlm.errors import MediaError

def refuse(message):
    raise MediaError(message)

ACTIONS = {
    "used": lambda: None,
    "refused": lambda: refuse("no"),
    "traceback": lambda: {}["missing"],
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda: time.sleep(60),
    "memory": lambda: bytearray(b"1" * 400_000_000) and None,
    "printed": lambda: os.write(2, b"panicked"),
}
KINDS = {name: (lambda folder, a=a: lambda random: a, 1) for name, a in ACTIONS.items()}
"""


def test_every_kind_of_failure_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "broken_kinds.py").write_text(KINDS)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "FUZZ_KINDS": "broken_kinds"}
    command = [sys.executable, str(TESTS / "fuzz.py"), "--seconds", "4", "--megabytes", "300"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    failures = ["traceback", "crash", "hang", "memory", "printed"]
    for name in failures:
        assert f"{name} 0: {name}: " in run.stdout, run.stdout + run.stderr
    assert "7 files, 5 failed" in run.stdout
    assert run.returncode == 1
