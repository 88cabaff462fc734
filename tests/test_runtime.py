"""OpenBLAS is used on Linux where it can be, and its absence changes nothing but the speed."""

import os
import subprocess
import sys

import pytest

from mlx_smolvlm import runtime
from mlx_smolvlm.cli import doctor_checks

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have a fast BLAS")

NAME = """
{first}
import mlx_smolvlm
import mlx.core as mx
mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
maps = open("/proc/self/maps").read()
print("libopenblas" in maps, mlx_smolvlm.runtime.openblas_problem)
"""


def run(first: str = "", **environment: str) -> str:
    """Whether a new process has loaded OpenBLAS, and what it says is in the way."""
    result = subprocess.run(
        [sys.executable, "-c", NAME.format(first=first)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    assert result.stderr == ""
    return result.stdout.strip()


@linux
def test_it_is_loaded_by_importing_the_package() -> None:
    assert run() == "True None"


@linux
def test_it_is_left_out_if_asked_or_too_late() -> None:
    assert run(MLX_SMOLVLM_OPENBLAS="0") == "False MLX_SMOLVLM_OPENBLAS is 0"
    assert run("import mlx.core") == "False mlx.core was imported before mlx_smolvlm"


@pytest.mark.parametrize(
    ("problem", "advice"),
    [
        ("cmeel-openblas is not installed", "pip install cmeel-openblas"),
        ("libgfortran.so.5: cannot open shared object file", "install libgfortran5"),
        ("mlx.core was imported before mlx_smolvlm", "import mlx_smolvlm first"),
        ("MLX_SMOLVLM_OPENBLAS is 0", "unset MLX_SMOLVLM_OPENBLAS"),
    ],
)
def test_doctor_says_what_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch, problem: str, advice: str
) -> None:
    monkeypatch.setattr(runtime, "openblas_problem", problem)
    finding = doctor_checks._check_blas()
    assert finding.status == "note"
    assert problem in finding.text
    assert finding.advice.startswith(advice)
    monkeypatch.setattr(runtime, "openblas_problem", None)
    assert doctor_checks._check_blas().status == "ok"


def test_a_library_that_is_missing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    monkeypatch.setattr(runtime, "openblas_problem", runtime.openblas_problem)
    monkeypatch.delenv(runtime.OPENBLAS_VARIABLE, raising=False)
    runtime.load_openblas()
    assert runtime.openblas_problem == "cmeel-openblas is not installed"
