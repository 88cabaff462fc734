"""Numbers of kernels of a forward pass, counted by benchmarks/kernels.py."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks import kernels as bench
from mlx_smolvlm.config import (
    Config,
    ImageConfig,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
)
from mlx_smolvlm.kv.options import CacheOptions
from mlx_smolvlm.model.model import Model

LAYERS = 3


@pytest.fixture(params=["untied", "tied", "8 bits"])
def model(request: pytest.FixtureRequest) -> Model:
    config = Config(
        vision=VisionConfig(64, 128, LAYERS, 2, 32, 8, 1e-6),
        text=TextConfig(64, 96, LAYERS, 4, 2, 16, 1e4, 1e-5, 100, 512, request.param == "tied"),
        scale_factor=2,
        image_token_id=99,
        eos_token_ids=(98,),
        image=ImageConfig(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), True),
        video=None,
        quantization=QuantizationConfig(None, None, None, None),
        dtype="float32",
        source="test",
    )
    model = Model(config)
    if request.param == "8 bits":
        nn.quantize(
            model,
            group_size=32,
            bits=8,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized") and "vision_model.embeddings" not in path
            ),
        )
    mx.eval(model.parameters())
    return model


def test_decoded_token(model: Model) -> None:
    assert bench.count_decoding(model).total() <= 12 * LAYERS + 8


def test_decoded_token_with_a_bounded_cache(model: Model) -> None:
    options = CacheOptions(max_kv_tokens=72)
    assert bench.count_decoding(model, options) == bench.count_decoding(model)


def test_decoded_token_with_a_packed_cache(wide: Model) -> None:
    # Packing, three updates instead of one, and products, scale and softmax instead of attention.
    assert bench.count_decoding(wide, CacheOptions(kv_bits=8)).total() <= 18 * 3 + 8


@pytest.mark.parametrize("answers", [1, 2, 9])
def test_decoded_tokens_of_several_answers(model: Model, answers: int) -> None:
    assert (
        bench.count_batch_decoding(model, answers).total()
        <= bench.count_decoding(model).total() + 1
    )


@pytest.mark.parametrize("answers", [1, 2, 9])
def test_decoded_tokens_of_answers_to_unlike_prompts(model: Model, answers: int) -> None:
    assert (
        bench.count_unlike_decoding(model, answers).total()
        <= bench.count_decoding(model).total() + 1
    )


def test_encoder(model: Model) -> None:
    # A quantized product has no fused bias. The one of q, k and v takes a kernel per layer; the
    # others are fused into the kernels that follow them (docs/decisions/kernels.md).
    packed = isinstance(model.vision_model.encoder.layers[0].mlp.fc1, nn.QuantizedLinear)
    one = bench.count_encoding(model, 32, 1).total()
    assert one <= (11 if packed else 10) * LAYERS + 12
    assert one == bench.count_encoding(model, 32, 13).total()


def test_count_of_a_known_graph() -> None:
    x = mx.ones((4, 8))
    w = mx.ones((8,))
    mx.eval(x, w)
    # One product, one norm, one sum; the transpose and the reshape are views.
    counted = bench.count_kernels(
        lambda: mx.fast.rms_norm(x @ x.T.reshape(8, 4) @ x, w, 1e-5).reshape(32) + 1
    )
    assert counted.total() == 4


def test_forward_never_waits_for_the_device(model: Model) -> None:
    # Within mx.compile an evaluation raises, so this fails if the forward pass evaluates.
    cache = model.make_cache()
    pixel_values = mx.zeros((2, 32, 32, 3))

    def forward(pixels: mx.array, token_id: mx.array) -> mx.array:
        embeds = model.encode(pixels).reshape(1, -1, 64)
        return model(embeds, cache)[0, -1] + model.step(token_id, cache)

    mx.eval(mx.compile(forward)(pixel_values, mx.array([1])))
