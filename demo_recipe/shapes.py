"""The demo's sizes: the architecture and keys of a SmolVLM checkpoint, only small."""

from __future__ import annotations

from tokenizers import Tokenizer

from demo_recipe.clips import VIDEO
from demo_recipe.tokenizer import find_token_id
from mlx_smolvlm.config import (
    Config,
    ImageConfig,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
)


def make_demo_config(tokenizer: Tokenizer) -> Config:
    """Configuration of the demo: tiles of 96 px and 16 tokens, pictures of 192 px."""
    return Config(
        vision=VisionConfig(
            hidden_size=192,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=3,
            image_size=96,
            patch_size=12,
            layer_norm_eps=1e-6,
        ),
        text=TextConfig(
            hidden_size=192,
            intermediate_size=448,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            vocab_size=tokenizer.get_vocab_size(),
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        ),
        scale_factor=2,
        image_token_id=find_token_id(tokenizer, "<image>"),
        eos_token_ids=(find_token_id(tokenizer, "<end_of_utterance>"),),
        image=ImageConfig(
            longest_edge=192,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            do_image_splitting=True,
        ),
        video=VIDEO,
        quantization=QuantizationConfig(text=None, vision=None, connector=None, embeddings=None),
        dtype="float32",
        source="demo_recipe",
    )
