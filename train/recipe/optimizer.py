"""Which parameters each optimizer moves: Muon the matrices of layers, AdamW the rest."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

_ADAM = ("embed", "lm_head", "norm", "bias", "dense_head", "referent_head")


def is_encoder_matrix(path: str, weight: mx.array) -> bool:
    """Whether `path` is a matrix of the vision encoder's layers."""
    return "vision_model.encoder" in path and is_matrix(path, weight)


def is_matrix(path: str, weight: mx.array) -> bool:
    """Whether `path` is a matrix that Muon moves."""
    return bool(weight.ndim == 2) and not any(word in path for word in _ADAM)


def is_encoder_rest(path: str, weight: mx.array) -> bool:
    """Whether `path` is any other parameter of the vision encoder."""
    return "vision_model." in path


class Optimizer(optim.MultiOptimizer):
    """Muon and AdamW, each once for the encoder and once for the rest."""

    def __init__(self) -> None:
        adam = [
            optim.AdamW(0.0, betas=[0.9, 0.98], bias_correction=True, weight_decay=0.0)
            for _ in "er"
        ]
        muon = [optim.Muon(0.0, momentum=0.95, weight_decay=0.0) for _ in "er"]
        super().__init__(
            [muon[0], adam[0], muon[1], adam[1]],
            [is_encoder_matrix, is_encoder_rest, is_matrix],
        )

    def set_rates(self, rate: float, encoder_share: float) -> None:
        """Set Muon's rate to `rate`, AdamW's to a fifth of it, the encoder's to a share of both."""
        shares: list[Any] = [encoder_share, 0.2 * encoder_share, 1.0, 0.2]
        for optimizer, share in zip(self.optimizers, shares, strict=True):
            optimizer.learning_rate = rate * share
