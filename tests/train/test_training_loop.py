"""The loop of a training, on a module that a hand can compute."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_smolvlm.checkpoint.headers import load_tensors
from mlx_smolvlm.errors import TrainingError
from mlx_smolvlm.train.loop import Loop, LoopOptions, Schedule, ScheduleKind, read_notes

Rows = tuple[mx.array, mx.array]


def squares(trainee: nn.Module, rows: Rows) -> tuple[mx.array, mx.array]:
    """Sum of squared errors, and how many rows there are."""
    x, y = rows
    return ((trainee(x) - y) ** 2).sum(), mx.array(float(len(y)))


def rows(number: int, count: int = 4) -> Rows:
    """Rows that follow from `number`."""
    rng = np.random.default_rng(number)
    return mx.array(rng.normal(size=(count, 3))), mx.array(rng.normal(size=(count, 1)))


def make(batch: Any = rows, dropout: float = 0.0, **options: Any) -> Loop:
    """A loop over a linear layer, with AdamW."""
    mx.random.seed(0)
    trainee = nn.Sequential(nn.Linear(3, 1), nn.Dropout(dropout))
    schedule = options.pop("schedule", Schedule(0.05, 12, warmup=2))
    adam = optim.AdamW(0.0, bias_correction=True)
    return Loop(trainee, squares, adam, batch, LoopOptions(schedule, **options))


def weights(loop: Loop) -> list[np.ndarray]:
    """Every trained number."""
    return [np.array(array) for _, array in tree_flatten(loop.trainee.parameters())]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [1 / 3, 2 / 3, 1, 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi / 2)), 0.1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.55, 0.1]),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1]),
    ],
)
def test_rates(kind: ScheduleKind, expected: list[float]) -> None:
    schedule = Schedule(2.0, 12, warmup=2, kind=kind, floor=0.1)
    found = [schedule.get_rate(step) / 2 for step in (0, 1, 2, 7, 12)]
    assert found == pytest.approx(expected)


def test_accumulated_batches_are_one_batch() -> None:
    # Batches of unlike size: every row counts the same, not every batch.
    parts = [rows(7, 2), rows(8, 5), rows(9, 1)]
    whole = tuple(mx.concatenate([part[i] for part in parts]) for i in (0, 1))
    several = make(lambda number: parts[number], accumulate=3).compute_gradient()
    one = make(lambda number: whole).compute_gradient()
    assert several[:2] == pytest.approx(one[:2], abs=1e-6)
    for own, other in zip(tree_flatten(several[2]), tree_flatten(one[2]), strict=True):
        np.testing.assert_allclose(np.array(own[1]), np.array(other[1]), atol=1e-6)


def test_the_gradient_is_clipped() -> None:
    clipped, free = make(clip=1e-3), make()
    assert clipped.advance().norm == pytest.approx(free.advance().norm)
    before = [np.array(a) for _, a in tree_flatten(make().trainee.parameters())]
    plain = Loop(
        make().trainee, squares, optim.SGD(0.0), rows, LoopOptions(Schedule(1.0, 2), clip=1e-3)
    )
    plain.advance()
    moved = sum(((a - b) ** 2).sum() for a, b in zip(weights(plain), before, strict=True))
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-3)


def test_a_run_that_goes_on_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole = make(dropout=0.5)
    reports = list(whole.run())
    assert [one.step for one in reports] == list(range(1, 13))
    path = tmp_path / "state.safetensors"
    first = make(dropout=0.5)
    for _ in range(5):
        first.advance()
    first.save(path, {"what": "a test"})
    assert read_notes(path) == {"what": "a test", "step": "5"}
    mx.random.seed(99)
    second = make(dropout=0.5)
    second.restore(path)
    rest = list(second.run())
    assert [one.loss for one in rest] == [one.loss for one in reports[5:]]
    for own, other in zip(weights(second), weights(whole), strict=True):
        np.testing.assert_array_equal(own, other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.safetensors"]


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    other = Loop(nn.Linear(4, 1), squares, optim.AdamW(0.0), rows, LoopOptions(Schedule(1.0, 2)))
    other.save(path, {})
    with pytest.raises(TrainingError, match="of this training"):
        make().restore(path)
    path.write_bytes(b"none")
    with pytest.raises(TrainingError, match="cannot be read"):
        make().restore(path)


@pytest.mark.parametrize("step", ["", "-1", "x", "1.5", "13", "9" * 5000, None])
def test_a_state_whose_step_was_edited_is_refused(tmp_path: Path, step: str | None) -> None:
    path = tmp_path / "state.safetensors"
    loop = make()
    loop.save(path, {})
    arrays = load_tensors(path)
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, {} if step is None else {"step": step})
    with pytest.raises(TrainingError, match=r"step '.{,39}, not a number; remove|is of step 13"):
        loop.restore(path)
    assert loop.step == 0


def test_a_state_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    loop = make()
    loop.save(path, {})
    arrays = load_tensors(path)
    mx.eval(arrays)
    name = next(name for name in arrays if name.startswith("trainee"))
    arrays[name] = arrays[name].astype(mx.int32)
    mx.save_safetensors(str(path), arrays, {"step": "0"})
    with pytest.raises(TrainingError, match=f"no '{name}' of this training"):
        loop.restore(path)


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    def broken(number: int) -> Rows:
        x, y = rows(number)
        return x, y * (math.nan if number == 1 else 1)

    loop = make(broken)
    loop.advance()
    before = weights(loop)
    with pytest.raises(TrainingError, match="the loss of step 2 is nan"):
        loop.advance()
    for own, other in zip(weights(loop), before, strict=True):
        np.testing.assert_array_equal(own, other)
