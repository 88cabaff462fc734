"""The demo's sizes: the architecture and keys of a SmolVLM checkpoint, only small."""

from __future__ import annotations

from tokenizers import Tokenizer

from mlx_smolvlm.config import (
    Config,
    ImageConfig,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
)


def demo_config(tokenizer: Tokenizer) -> Config:
    """Configuration of the demo: tiles of 64 px and 16 tokens, pictures of at most 2 x 2 tiles."""
    return Config(
        vision=VisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
            layer_norm_eps=1e-6,
        ),
        text=TextConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=64,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            vocab_size=tokenizer.get_vocab_size(),
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        ),
        scale_factor=2,
        image_token_id=tokenizer.token_to_id("<image>"),
        eos_token_ids=(tokenizer.token_to_id("<end_of_utterance>"),),
        image=ImageConfig(
            longest_edge=128,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            do_image_splitting=True,
        ),
        video=None,
        quantization=QuantizationConfig(text=None, vision=None, connector=None, embeddings=None),
        dtype="float32",
        source="mlx_smolvlm.train.demo",
    )
