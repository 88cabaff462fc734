"""The demo's sizes: the architecture and keys of a SmolVLM checkpoint, only small."""

from __future__ import annotations

from tokenizers import Tokenizer

from mlx_smolvlm.config import (
    Config,
    ImageConfig,
    QuantizationConfig,
    TextConfig,
    VideoConfig,
    VisionConfig,
)
from mlx_smolvlm.train.tokenizer import token_id

# SmolVLM2's, but for half as many frames at most and the demo's tile.
VIDEO = VideoConfig(fps=1.0, max_frames=32, longest_edge=64, skip_secs=1.0)


def demo_config(tokenizer: Tokenizer) -> Config:
    """Configuration of the demo: a picture is one tile of 64 px and 16 tokens."""
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
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
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
        image_token_id=token_id(tokenizer, "<image>"),
        eos_token_ids=(token_id(tokenizer, "<end_of_utterance>"),),
        image=ImageConfig(
            longest_edge=64,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            do_image_splitting=True,
        ),
        video=VIDEO,
        quantization=QuantizationConfig(text=None, vision=None, connector=None, embeddings=None),
        dtype="float32",
        source="mlx_smolvlm.train.demo",
    )
