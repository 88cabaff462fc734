"""The optimizers: Muon for the matrices of layers, AdamW for the other parameters.

The demo's parameters are many and small, so that a GPU would wait for the next kernel most
of the time: matrices of one shape are moved as one stack, and all else as one vector.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

_ADAM = ("embed", "lm_head", "norm", "bias", "dense_head", "referent_head")


def is_encoder_matrix(path: str, weight: mx.array) -> bool:
    """Whether `path` is a matrix of the vision encoder's layers."""
    return "vision_model.encoder" in path and is_matrix(path, weight)


def is_matrix(path: str, weight: mx.array) -> bool:
    """Whether Muon trains the matrix at `path`."""
    return bool(weight.ndim == 2) and not any(word in path for word in _ADAM)


def is_encoder_rest(path: str, weight: mx.array) -> bool:
    """Whether `path` is any other parameter of the vision encoder."""
    return "vision_model." in path


class StackedMuon(optim.Muon):
    """MLX's Muon without weight decay, on stacks of matrices of one shape.

    Source: Muon (Jordan et al., 2024), https://kellerjordan.github.io/posts/muon/.
    """

    def init(self, parameters: dict[str, Any]) -> None:
        """Momentum for all of `parameters`, by shape."""
        for shape, names in self._shapes(dict(tree_flatten(parameters))).items():
            self.state[_format_key(shape)] = mx.zeros((len(names), *shape))
        self._initialized = True

    def apply_gradients(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> Any:
        """`parameters` after a step along `gradients`, as a tree of the latter's leaves."""
        flat: dict[str, mx.array] = dict(tree_flatten(gradients))
        held: dict[str, mx.array] = dict(tree_flatten(parameters))
        self.state["step"] = self.step + 1
        moved: list[tuple[str, mx.array]] = []
        for shape, names in self._shapes(flat).items():
            gradient = mx.stack([flat[name] for name in names])
            momentum = (
                self.momentum * self.state[_format_key(shape)] + (1 - self.momentum) * gradient
            )
            self.state[_format_key(shape)] = momentum
            ahead = gradient * (1 - self.momentum) + momentum * self.momentum
            rate = self.learning_rate * max(1, shape[0] / shape[1]) ** 0.5
            step = rate * orthogonalize(ahead, self.ns_steps)
            moved += [(name, held[name] - step[i]) for i, name in enumerate(names)]
        return tree_unflatten(moved) if moved else {}

    def _shapes(self, flat: dict[str, mx.array]) -> dict[tuple[int, ...], list[str]]:
        """Names by shape."""
        found: dict[tuple[int, ...], list[str]] = {}
        for name, weight in flat.items():
            found.setdefault(weight.shape, []).append(name)
        return found


class FlatAdamW(optim.AdamW):
    """MLX's AdamW on one vector of all parameters."""

    def init(self, parameters: dict[str, Any]) -> None:
        """Moments for all of `parameters`."""
        flat: Any = tree_flatten(parameters)
        size = sum(weight.size for _, weight in flat)
        self.state["all"] = {"m": mx.zeros(size), "v": mx.zeros(size)}
        self._initialized = True

    def apply_gradients(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> Any:
        """`parameters` after a step along `gradients`, as a tree of the latter's leaves."""
        flat: Any = tree_flatten(gradients)
        held: dict[str, mx.array] = dict(tree_flatten(parameters))
        self.state["step"] = self.step + 1
        if not flat:
            return {}
        gradient = mx.concatenate([g.reshape(-1) for _, g in flat])
        before = mx.concatenate([held[name].reshape(-1) for name, _ in flat])
        after = self.apply_single(gradient, before, self.state["all"])
        moved, start = [], 0
        for name, g in flat:
            moved.append((name, after[start : start + g.size].reshape(g.shape)))
            start += g.size
        return tree_unflatten(moved)


def orthogonalize(matrices: mx.array, steps: int) -> mx.array:
    """Make `matrices` (n, rows, columns) nearly orthogonal by Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.swapaxes(-1, -2) if is_tall else matrices
    x = x / (mx.sqrt((x * x).sum((-2, -1), keepdims=True)) + 1e-7)
    for _ in range(steps):
        square = x @ x.swapaxes(-1, -2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.swapaxes(-1, -2) if is_tall else x


def _format_key(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class Optimizer(optim.MultiOptimizer):
    """Muon and AdamW, each once for the encoder and once for the other parameters."""

    def __init__(self) -> None:
        adam = [
            FlatAdamW(0.0, betas=[0.9, 0.98], bias_correction=True, weight_decay=0.0) for _ in "er"
        ]
        muon = [StackedMuon(0.0, momentum=0.95, weight_decay=0.0) for _ in "er"]
        super().__init__(
            [muon[0], adam[0], muon[1], adam[1]],
            [is_encoder_matrix, is_encoder_rest, is_matrix],
        )

    def set_rates(self, rate: float, encoder_share: float) -> None:
        """Set Muon's rate to `rate`, AdamW's to a fifth of it, the encoder's to a share of both."""
        shares: list[Any] = [encoder_share, 0.2 * encoder_share, 1.0, 0.2]
        for optimizer, share in zip(self.optimizers, shares, strict=True):
            optimizer.learning_rate = rate * share
