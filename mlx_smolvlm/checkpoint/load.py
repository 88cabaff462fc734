"""Load a checkpoint folder of this package's format strictly.

The folder holds config.json, the weights as safetensors (one file, or several with an index),
tokenizer.json and chat_template.jinja. Tensor names are those of `Model(config).parameters()`;
loading renames nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_smolvlm.checkpoint.headers import FLOATS, TensorInfo, load_tensors, read_headers
from mlx_smolvlm.config import DTYPES, FORMAT, Config
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.records import read_json, read_text

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
CARD_FILE = "README.md"

LARGEST_TEMPLATE = 2**20  # bytes

# Both are small. The patch embedding's width (3 * patch_size**2) is not a multiple of the group
# size, and the whole position embedding is added to the patches.
NEVER_QUANTIZED = (
    "vision_model.embeddings.patch_embedding",
    "vision_model.embeddings.position_embedding",
)


def read_config(folder: Path) -> Config:
    """Read config.json in `folder`.

    Raises:
        CheckpointError: config.json is missing or not of this format.
    """
    return Config.from_dict(read_json(Path(folder) / CONFIG_FILE))


def find_tokenizer(folder: Path) -> Path:
    """Return the path of tokenizer.json in `folder`.

    Raises:
        CheckpointError: It is missing.
    """
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; convert the checkpoint again")
    return path


def is_own(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint of this package's format, in any version."""
    try:
        return read_json(folder / CONFIG_FILE).get("format") == FORMAT
    except CheckpointError:
        return False


def read_chat_template(folder: Path) -> str:
    """Read the Jinja chat template in `folder`.

    Raises:
        CheckpointError: It is missing, too large or not UTF-8.
    """
    return read_text(Path(folder) / TEMPLATE_FILE, LARGEST_TEMPLATE)


def load_model(
    folder: Path, dtype: str | None = None, tensors: dict[str, TensorInfo] | None = None
) -> Model:
    """Load the model in `folder`, with its weights in memory.

    Args:
        folder: A checkpoint folder of this format.
        dtype: Type for the weights, and for the scales and biases of quantized weights:
            "float32", "float16" or "bfloat16". None keeps the stored type.
        tensors: The result of `read_headers(folder)`, if it is known already.

    Raises:
        CheckpointError: The folder is not a complete checkpoint of this format, or a tensor is
            missing, unknown, or has another shape than config.json says.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    config = read_config(folder)
    if tensors is None:
        tensors = read_headers(folder)
    model = build_checked_model(config, tensors)
    weights: list[tuple[str, mx.array]] = []
    try:
        for file in sorted({info.file for info in tensors.values()}):
            weights += load_tensors(file).items()
        if dtype is not None:
            weights = [(name, _cast(array, getattr(mx, dtype))) for name, array in weights]
        model.load_weights(weights, strict=True)
        del weights
        mx.eval(model.parameters())
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read: {error}") from None
    model.eval()
    return model


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Cast `array` to `dtype` if it holds floats, else return it unchanged."""
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def build_model(config: Config) -> Model:
    """Build the model that `config` describes, quantized layers included, without its weights.

    Raises:
        CheckpointError: MLX cannot build layers of these sizes, or a group size does not divide
            the width of a matrix.
    """
    try:
        model = Model(config)
    except (OverflowError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"config: no model has such sizes: {error}") from None

    def find_quantization(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in NEVER_QUANTIZED or not hasattr(module, "to_quantized"):
            return False
        quantization = config.quantization.find(path)
        if quantization is None:
            return False
        width = module.weight.shape[-1]
        if quantization.group_size < 1 or width % quantization.group_size:
            raise CheckpointError(
                f"config: group_size {quantization.group_size} does not divide the width "
                f"{width} of '{path}'"
            )
        return dict(vars(quantization))

    try:
        nn.quantize(model, class_predicate=find_quantization)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"config: quantization cannot be applied: {error}") from None
    return model


def build_checked_model(config: Config, tensors: dict[str, TensorInfo]) -> Model:
    """Build the model that `config` describes and check that `tensors` are its parameters.

    Raises:
        CheckpointError: As in `build_model` and `check_tensors`.
    """
    if config.text.num_hidden_layers + config.vision.num_hidden_layers > len(tensors):
        raise CheckpointError("config.json states more layers than there are tensors")
    model = build_model(config)
    check_tensors(model, tensors)
    return model


def check_tensors(model: Model, tensors: dict[str, TensorInfo]) -> None:
    """Check that names, shapes and types of `tensors` match the parameters of `model`.

    Raises:
        CheckpointError: A tensor is missing, unknown or different.
    """
    parameters: Any = tree_flatten(model.parameters())
    expected: dict[str, mx.array] = {name: a for name, a in parameters if a is not None}
    for name, array in expected.items():
        if name not in tensors:
            raise CheckpointError(f"tensor '{name}' is missing; convert the checkpoint again")
        info = tensors[name]
        if info.shape != tuple(array.shape):
            raise CheckpointError(
                f"tensor '{name}' has shape {info.shape}; config.json asks for {array.shape}"
            )
        wanted = "floats" if mx.issubdtype(array.dtype, mx.floating) else str(array.dtype)
        stored = {"U32": "mlx.core.uint32", "U8": "mlx.core.uint8"}.get(info.dtype, info.dtype)
        if info.dtype in FLOATS:
            stored = "floats"
        if stored != wanted:
            raise CheckpointError(f"tensor '{name}' is stored as {info.dtype}; expected {wanted}")
    for name in tensors:
        if name not in expected:
            raise CheckpointError(f"tensor '{name}' is not known; convert the checkpoint again")
