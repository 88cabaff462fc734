"""Recipes: files and names that say what precision each matrix gets."""

from pathlib import Path

import pytest

from mlx_smolvlm.checkpoint.load import load_model, read_config
from mlx_smolvlm.config import Quantization
from mlx_smolvlm.convert.options import RECIPES, ConvertOptions, read_recipe
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import hf_folder as hf

DOWN = "text_model.layers.*.mlp.down_proj"
SIX, FOUR = Quantization(6, 32, "affine"), Quantization(4, 64, "affine")


def recipe(folder: Path, text: str) -> str:
    """The path of a recipe file that holds `text`."""
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_says_what_parts_and_patterns_get(tmp_path):
    text = f"""
        bits = 4
        embeddings_bits = 16
        [overrides]
        "{DOWN}" = {{ bits = 6, group_size = 32 }}
        "*.layers.1.mlp.down_proj" = {{ bits = 16 }}
        "connector.*" = {{ mode = "mxfp4" }}
        "text_model.layers.0.self_attn.o_proj" = {{ bits = 3 }}
    """
    options = read_recipe(recipe(tmp_path, text))
    assert (options.bits, options.embeddings_bits, options.group_size) == (4, 16, 64)
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out", options)
    q = read_config(out).quantization
    assert q.find("text_model.layers.0.mlp.down_proj") == SIX
    assert q.find("text_model.layers.1.mlp.down_proj") is None  # the last pattern that fits
    assert q.find("connector.modality_projection.proj") == Quantization(4, 32, "mxfp4")
    assert q.find("text_model.layers.0.self_attn.o_proj") == Quantization(3, 64, "affine")
    assert q.find("text_model.layers.1.self_attn.o_proj") == FOUR
    assert q.find("lm_head") is None
    assert dict(q.overrides)["text_model.layers.0.mlp.down_proj"] == SIX
    load_model(out)  # strictly


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bits = ", "not valid TOML"),
        ("bots = 4", "the key 'bots' is not known; known: bits"),
        ('bits = "4"', "bits must be a whole number, not '4'"),
        ("bits = true", "bits must be a whole number, not True"),
        ("mode = 4", "mode must be a text, not 4"),
        ("bits = 7", "7 bits are not available"),
        ("overrides = 4", "overrides must be a table, not 4"),
        ('[overrides]\n"lm_head" = 4', "'lm_head' must be a table such as"),
        ('[overrides]\n"lm_head" = {bit = 4}', "'lm_head': the key 'bit' is not known"),
        ('[overrides]\n"lm_head" = {bits = 7}', "'lm_head': bits is 7; choose 2, 3"),
        ('[overrides]\n"lm_head" = {}', "bits is None"),
        ('[overrides]\n"lm_head" = {bits = 4, group_size = 48}', "group_size is 48"),
        ('[overrides]\n"lm_head" = {mode = "q4"}', "mode 'q4' is none of affine, mxfp4"),
        ('[overrides]\n"lm_head" = {mode = "mxfp8", bits = 4}', "mode mxfp8 has bits 8, not 4"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_what_is_wrong(tmp_path, text, match):
    with pytest.raises(CheckpointError, match=match) as error:
        read_recipe(recipe(tmp_path, text))
    assert "recipe.toml" in str(error.value)


def test_neither_a_name_nor_a_file(tmp_path):
    with pytest.raises(
        CheckpointError, match="none of tiny, balanced, quality, and not a readable file"
    ):
        read_recipe(str(tmp_path / "small"))


def test_a_pattern_that_matches_nothing_is_refused_and_nothing_written(tmp_path):
    options = ConvertOptions(bits=4, overrides=(("text_model.*.mlp.dawn_proj", None),))
    with pytest.raises(CheckpointError, match=r"'text_model.\*.mlp.dawn_proj' matches no matrix"):
        convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_convert_and_load(tmp_path, name):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out", read_recipe(name))
    assert read_config(out).quantization.text.bits == RECIPES[name].bits
    load_model(out)
