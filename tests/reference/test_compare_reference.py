"""What `compare` measures, against torch on transformers' models of the same weights.

A random model and what became of it are saved by transformers and converted; "packed" is
converted with packed weights, which transformers gets as the floats that they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402
from transformers import (  # noqa: E402
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
)

from mlx_smolvlm.convert.compare import CompareOptions, Comparison, compare  # noqa: E402
from mlx_smolvlm.convert.compare.measure import compare_checkpoints  # noqa: E402
from mlx_smolvlm.convert.compare.samples import PLAIN_QUESTION  # noqa: E402
from mlx_smolvlm.convert.names import list_entries  # noqa: E402
from mlx_smolvlm.convert.open_model import FolderReader, SourceReader  # noqa: E402
from mlx_smolvlm.convert.options import ConvertOptions  # noqa: E402
from mlx_smolvlm.convert.run import convert_checkpoint  # noqa: E402
from mlx_smolvlm.convert.source import open_source  # noqa: E402
from mlx_smolvlm.generate.sampling import Sampling  # noqa: E402
from mlx_smolvlm.media.tiles import tile_picture  # noqa: E402
from mlx_smolvlm.prompt.messages import read_request  # noqa: E402
from mlx_smolvlm.smolvlm import load  # noqa: E402

TOKENIZER = str(Path(__file__).parents[1] / "helpers" / "tiny_tokenizer.json")
CLOSE = 1e-4
WINDOW = 512  # tokens that are read at once, as told in Package.md
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}: "
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEXTS = (
    "The ferry leaves the island at seven, long before the shops open. " * 20,
    "One, two, 3, 4!",
)
QUESTION = "What is this?"


@dataclass
class Trio:
    """The reference and what it became: in transformers, and our two folders."""

    models: tuple[Any, Any]
    folders: tuple[Path, Path]
    source: Path


def random_model(tokenizer: Any, tied: bool) -> Any:
    config = Idefics3Config(
        vision_config={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", "rms_norm_eps": 1e-5, "pad_token_id": 0,
                     "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                     "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "vocab_size": tokenizer.get_vocab_size() + 3,
                     "max_position_embeddings": 4096, "tie_word_embeddings": tied,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        scale_factor=2,
        image_token_id=tokenizer.token_to_id("<image>"),
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                value.copy_(1 + 0.1 * torch.randn_like(value))
            else:
                fan_in = value[0].numel() if value.ndim > 1 else 100
                value.copy_(torch.randn_like(value) * 1.5 / fan_in**0.5)
    return model


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.generation_config.eos_token_id = tokenizer.token_to_id("<end_of_utterance>")
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def take_floats(model: Any, folder: Path) -> None:
    """Give `model` every matrix of our `folder` as floats, split into its members."""
    opened = FolderReader(folder)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for entry in list_entries(opened.config):
            if not entry.quantizable:
                continue
            matrix = opened.read_matrix(entry.path)
            floats, start = np.array(matrix.get_rows(0, matrix.shape[0])), 0
            for member, shape in zip(entry.members, entry.shapes, strict=True):
                name = "lm_head.weight" if member == "lm_head" else f"model.{member}.weight"
                part = torch.from_numpy(floats[start : start + shape[0]])
                rows, width = parameters[name].shape
                parameters[name].copy_(part[:rows, :width])
                start += shape[0]


@pytest.fixture(scope="module", params=["noise", "packed", "packed tied"])
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    torch.set_num_threads(1)
    folder, tokenizer = tmp_path_factory.mktemp("trio"), Tokenizer.from_file(TOKENIZER)
    tied = "tied" in request.param
    first, second = random_model(tokenizer, tied), random_model(tokenizer, tied)
    source = save(first, tokenizer, folder / "first")
    reference = convert_checkpoint(source, folder / "reference")
    if request.param == "noise":
        with torch.no_grad():
            for value in second.parameters():
                value.mul_(1 + 0.1 * torch.randn_like(value))
        other = convert_checkpoint(save(second, tokenizer, folder / "second"), folder / "other")
    else:
        options = ConvertOptions(bits=3, vision_bits=4, connector_bits=4, embeddings_bits=5)
        other = convert_checkpoint(source, folder / "other", options)
        take_floats(second, other)
    return Trio((first, second), (reference, other), source)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def options(picture: Image.Image) -> CompareOptions:
    return CompareOptions(
        texts=TEXTS, pictures=(("noise", picture),), questions=(QUESTION,), max_tokens=6,
        detail="high",
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(trio: Trio, options: CompareOptions) -> Comparison:
    return compare(*trio.folders, options)


def theirs(models: Any, windows: list[np.ndarray], start: int = 1, **media: Any) -> dict[str, Any]:
    """What torch says of two models' predictions of `windows` from `start` on."""
    logs, targets = ([], []), []
    for ids in windows:
        batch = torch.from_numpy(ids.astype(np.int64))[None]
        targets.append(batch[0, start:])
        for log, model in zip(logs, models, strict=True):
            with torch.no_grad():
                logits = model(input_ids=batch, **media).logits[0, start - 1 : -1]
            log.append(F.log_softmax(logits.double(), -1))
    (a, b), true = (torch.cat(log) for log in logs), torch.cat(targets)
    divergence = F.kl_div(b, a, reduction="none", log_target=True).sum(-1)
    return {
        "tokens": len(true),
        "kl_nats": divergence.mean().item(),
        "kl_nats_median": torch.quantile(divergence, 0.5).item(),
        "kl_nats_p99": torch.quantile(divergence, 0.99).item(),
        "kl_nats_max": divergence.max().item(),
        "top_1_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
        "perplexity_reference": F.nll_loss(a, true).exp().item(),
        "perplexity_other": F.nll_loss(b, true).exp().item(),
    }


def test_texts(trio: Trio, found: Comparison) -> None:
    tokenizer = Tokenizer.from_file(TOKENIZER)
    ids = [np.array(tokenizer.encode(text).ids) for text in TEXTS]
    assert ids[0].size > WINDOW  # more than one window
    windows = [one[i : i + WINDOW] for one in ids for i in range(0, one.size, WINDOW)]
    expected = theirs(trio.models, windows)
    assert expected["kl_nats"] > 0.01
    assert 0.05 < expected["top_1_agreement"] < 0.99
    assert found.texts is not None
    for name, value in expected.items():
        assert getattr(found.texts, name) == pytest.approx(value, rel=CLOSE), name


def pixels_of(trio: Trio, picture: Image.Image) -> Any:
    """The picture's tiles as transformers takes them."""
    config = FolderReader(trio.folders[0]).config
    tiled = np.ascontiguousarray(tile_picture(picture, config, "high").pixel_values)
    return torch.from_numpy(tiled).permute(0, 3, 1, 2)[None]


def test_answers(trio: Trio, found: Comparison, picture: Image.Image) -> None:
    vlms = [load(folder, dtype="float32") for folder in trio.folders]
    sampling = Sampling(max_tokens=6)
    for pair, (text, images) in zip(
        found.answers, ((QUESTION, [picture]), (PLAIN_QUESTION, [])), strict=True
    ):
        replies = [vlm.ask(text, images=images, sampling=sampling) for vlm in vlms]
        assert (pair.reference, pair.other) == (replies[0].text, replies[1].text)
        ids = [reply.token_ids for reply in replies]
        assert pair.tokens == max(map(len, ids))
        same = sum(ids[0][:n] == ids[1][:n] for n in range(1, min(map(len, ids)) + 1))
        assert pair.equal_tokens == same


def test_answers_are_scored_with_their_pictures(trio: Trio, picture: Image.Image) -> None:
    options = CompareOptions(
        texts=(), pictures=(("noise", picture),), questions=(QUESTION,), max_tokens=6, detail="high"
    )
    found = compare(*trio.folders, options)
    assert found.texts is None
    parts = []
    vlm = load(trio.folders[0], dtype="float32")
    for pictures in ([picture], []):
        request = read_request(QUESTION if pictures else PLAIN_QUESTION, pictures, (), None)
        media = vlm.engine.open_media(request, "high")
        prompt = vlm.engine.make_prompt(request.messages, media).input_ids
        reply = vlm.ask(request.messages, images=pictures, sampling=Sampling(max_tokens=6))
        media = {"pixel_values": pixels_of(trio, picture)} if pictures else {}
        ids = np.concatenate([prompt, reply.token_ids])
        parts.append(theirs(trio.models, [ids], prompt.size, **media))
    assert found.answers_forced is not None
    total = sum(part["tokens"] for part in parts)
    assert found.answers_forced.tokens == total
    for name in ("kl_nats", "top_1_agreement"):
        mean = sum(part[name] * part["tokens"] for part in parts) / total
        assert getattr(found.answers_forced, name) == pytest.approx(mean, rel=CLOSE), name


def test_picture_features(trio: Trio, found: Comparison, picture: Image.Image) -> None:
    features = []
    with torch.no_grad():
        for model in trio.models:
            pixels = pixels_of(trio, picture)[0]
            patches = model.model.vision_model(pixel_values=pixels).last_hidden_state
            features.append((patches, model.model.connector(patches)))
    for number, loss in enumerate(found.features):
        one, other = (pair[number].double().flatten(0, 1) for pair in features)
        cosine = F.cosine_similarity(one, other, dim=-1)
        error = (other - one).norm(dim=-1) / one.norm(dim=-1)
        assert loss.vectors == len(one)
        assert loss.cosine == pytest.approx(cosine.mean().item(), abs=CLOSE)
        assert loss.cosine_least == pytest.approx(cosine.min().item(), abs=CLOSE)
        assert loss.relative_error == pytest.approx(error.mean().item(), rel=CLOSE)
    assert [loss.name for loss in found.features] == ["patch_features", "image_embeds"]
    assert found.features[0].cosine < 0.9999


def test_states_after_each_layer(trio: Trio, found: Comparison) -> None:
    ids = torch.tensor(Tokenizer.from_file(TOKENIZER).encode(TEXTS[0]).ids[:256])[None]
    with torch.no_grad():
        states = [model(ids, output_hidden_states=True).hidden_states for model in trio.models]
    decoder = [one for one in found.layers if one.path.startswith("text_model.layers.")]
    assert len(decoder) == 3
    # transformers' last state is after the final norm: the last layer's own is not given
    for number, loss in enumerate(decoder[:-1]):
        one, other = (state[number + 1][0].double() for state in states)
        error = ((other - one).norm(dim=-1) / one.norm(dim=-1)).mean()
        assert loss.relative_error == pytest.approx(error.item(), rel=CLOSE)


def test_matrices(trio: Trio, found: Comparison) -> None:
    parameters = [dict(model.named_parameters()) for model in trio.models]
    errors = {one.path: one.relative_error for one in found.matrices}
    layer = "text_model.layers.1.self_attn"
    checked = {
        f"{layer}.qkv_proj": [f"model.{layer}.{x}_proj.weight" for x in "qkv"],
        "text_model.layers.2.mlp.down_proj": ["model.text_model.layers.2.mlp.down_proj.weight"],
        "connector.modality_projection.proj": ["model.connector.modality_projection.proj.weight"],
        "vision_model.encoder.layers.0.mlp.fc2": [
            "model.vision_model.encoder.layers.0.mlp.fc2.weight"
        ],
        "text_model.embed_tokens": ["model.text_model.embed_tokens.weight"],
    }
    for path, names in checked.items():
        one, other = (torch.cat([p[name].double() for name in names]) for p in parameters)
        expected = ((other - one).norm() / one.norm()).item()
        assert expected > 0.01
        assert errors[path] == pytest.approx(expected, rel=CLOSE), path


def test_the_source_itself_is_the_same_reference(
    trio: Trio, found: Comparison, options: CompareOptions
) -> None:
    again = compare_checkpoints(
        SourceReader(open_source(trio.source)), FolderReader(trio.folders[1]), options
    )
    assert again.texts is not None
    assert found.texts is not None
    assert again.texts.kl_nats == pytest.approx(found.texts.kl_nats, rel=1e-6)
    assert [one.relative_error for one in again.matrices] == pytest.approx(
        [one.relative_error for one in found.matrices], rel=1e-6
    )
