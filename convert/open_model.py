"""Open checkpoints for measurements: a converted folder, or a source without converting it.

Both load with float32 activations while matrices stay as stored: scales, biases, norms and the
token embeddings are cast, which are a small part of the bytes. So measurements show what the
weights lost, not how a device rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_smolvlm.checkpoint.headers import WeightFiles
from mlx_smolvlm.checkpoint.load import (
    TOKENIZER_FILE,
    build_model,
    find_tokenizer,
    load_model,
    read_chat_template,
    read_config,
)
from mlx_smolvlm.config import Config, Quantization
from mlx_smolvlm.convert.options import ConvertOptions, unpack
from mlx_smolvlm.convert.run import Plan, plan_checkpoint
from mlx_smolvlm.convert.source import Source
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.generate.engine import Engine
from mlx_smolvlm.kv.options import CacheOptions
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.prompt.builder import PromptBuilder
from mlx_smolvlm.prompt.tokenizer import LARGEST_FILE, parse_tokenizer, read_tokenizer
from mlx_smolvlm.smolvlm import SmolVLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FEW_ROWS = 16  # up to so many, MLX's packed product is faster on a CPU than unpacking first


@dataclass(frozen=True)
class Matrix:
    """The stored arrays of a matrix, by suffix; `quantization` is None if it holds floats."""

    arrays: dict[str, mx.array]
    quantization: Quantization | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the unpacked matrix."""
        rows, width = self.arrays["weight"].shape
        q = self.quantization
        return (rows, width) if q is None else (rows, width * 32 // q.bits)

    def get_rows(self, start: int, stop: int) -> mx.array:
        """Return rows `start` to `stop` in float32."""
        arrays = {suffix: array[start:stop] for suffix, array in self.arrays.items()}
        if self.quantization is None:
            return arrays["weight"].astype(mx.float32)
        wide = {suffix: _cast_float32(array) for suffix, array in arrays.items()}
        return unpack(wide, self.quantization, mx.float32)


class CheckpointReader(Protocol):
    """An open checkpoint, of which only headers have been read."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Config: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def nbytes(self) -> int:
        """Size of its weights in bytes."""
        ...

    def load(self) -> SmolVLM:
        """Load the model into memory."""
        ...

    def read_matrix(self, path: str) -> Matrix:
        """Read the weight of the module at `path`; it is not cached."""
        ...


class FolderReader:
    """Reads a checkpoint folder of this package's format."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.name = folder, name or str(folder)
        self.config = read_config(folder)
        self.tokenizer = read_tokenizer(find_tokenizer(folder), self.config.text.vocab_size)
        self._weights = WeightFiles(folder)

    @property
    def nbytes(self) -> int:
        """Size of its weights in bytes."""
        return sum(info.nbytes for info in self._weights.tensors.values())

    def load(self) -> SmolVLM:
        """Load the model into memory; errors as in `checkpoint.load.load_model`."""
        builder = PromptBuilder(self.tokenizer, read_chat_template(self.folder), self.config)
        return _make_measurable(self.folder, self.config, load_model(self.folder), builder)

    def read_matrix(self, path: str) -> Matrix:
        """Read the weight of the module at `path`; it is not cached."""
        names = {s: f"{path}.{s}" for s in ("weight", "scales", "biases")}
        weights = self._weights
        arrays = {s: weights.read(name) for s, name in names.items() if name in weights.tensors}
        return Matrix(arrays, self.config.quantization.find(path) if len(arrays) > 1 else None)


class SourceReader:
    """Reads a source of the converter as `plan` would write it; by default all in floats."""

    def __init__(self, source: Source, plan: Plan | None = None) -> None:
        self._plan: Plan = plan or plan_checkpoint(source, ConvertOptions(bits=16))
        self._steps = {step.entry.path: step for step in self._plan.steps}
        self.name, self.config = source.name, self._plan.config
        self.tokenizer = parse_tokenizer(
            source.read_text(TOKENIZER_FILE, LARGEST_FILE),
            source.folder / TOKENIZER_FILE,
            self.config.text.vocab_size,
        )
        self._dtype: mx.Dtype = getattr(mx, self.config.dtype)

    @property
    def nbytes(self) -> int:
        """Size of its weights in bytes."""
        return sum(step.nbytes(self._dtype.size) for step in self._plan.steps)

    def load(self) -> SmolVLM:
        """Load the model into memory, building it module by module.

        Raises:
            CheckpointError: The weights cannot be read.
        """
        folder = self._plan.source.folder
        model = build_model(self.config)
        weights = []
        try:
            for path, step in self._steps.items():
                arrays = self._plan.build(step)
                mx.eval(arrays)
                weights += [(f"{path}.{suffix}", array) for suffix, array in arrays.items()]
                mx.clear_cache()
        except RuntimeError as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from None
        model.load_weights(weights, strict=True)
        model.eval()
        builder = PromptBuilder(self.tokenizer, self._plan.template, self.config)
        return _make_measurable(folder, self.config, model, builder)

    def read_matrix(self, path: str) -> Matrix:
        """Read the weight of the module at `path`; it is not cached."""
        arrays = self._plan.build(self._steps[path])
        arrays.pop("bias", None)
        return Matrix(arrays, self._steps[path].target)


def _make_measurable(folder: Path, config: Config, model: Model, builder: PromptBuilder) -> SmolVLM:
    """Make a `SmolVLM` with float32 activations that keeps no keys and values between prompts."""
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    float_arrays = [
        (name, _cast_float32(array))
        for name, array in parameters
        if array.ndim == 1
        or name.endswith((".scales", ".biases"))
        or name == "text_model.embed_tokens.weight"
    ]
    model.update(tree_unflatten(float_arrays))
    mx.eval(model.parameters())
    if mx.default_device().type == mx.DeviceType.cpu:
        modules = tree_map(_replace_linear, model.leaf_modules(), is_leaf=nn.Module.is_module)
        model.update_modules(modules)
    return SmolVLM(Engine(folder, config, model, builder, CacheOptions(memory_bytes=0)))


def _cast_float32(array: mx.array) -> mx.array:
    """Cast `array` to float32 if it holds floats, else return it unchanged."""
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _replace_linear(module: nn.Module) -> nn.Module:
    """Return `module`, or an `UnpackingLinear` for a quantized linear layer."""
    return UnpackingLinear(module) if isinstance(module, nn.QuantizedLinear) else module


class UnpackingLinear(nn.Module):
    """A packed linear layer that unpacks its weight for each product.

    The result differs from MLX's packed product only by rounding. With hundreds of rows it takes a
    twentieth of the time on a CPU. The unpacked weight is freed after the product.
    """

    def __init__(self, packed: nn.QuantizedLinear) -> None:
        super().__init__()
        self.packed = packed

    def __call__(self, x: mx.array) -> mx.array:
        packed = self.packed
        if x.size // x.shape[-1] <= FEW_ROWS:
            result: mx.array = packed(x)
            return result
        weight = unpack_weight(packed)
        return mx.addmm(packed.bias, x, weight.T) if "bias" in packed else x @ weight.T


def unpack_weight(module: nn.Module) -> mx.array:
    """Return the float32 weight of a packed linear layer or embedding."""
    arrays = {s: module[s] for s in ("weight", "scales", "biases") if module.get(s) is not None}
    quantization = Quantization(module.bits, module.group_size, module.mode)
    return unpack(arrays, quantization, mx.float32)
