"""What two observed checkpoints differ in, the reference first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.config import Config
from mlx_smolvlm.convert.compare.observe import (
    Observation,
    Predictions,
    compare_predictions,
    compute_cosines,
    compute_frobenius_error,
    compute_relative_errors,
    record_outputs,
)
from mlx_smolvlm.convert.compare.report import (
    AnswerPair,
    FeatureLoss,
    LayerLoss,
    MatrixLoss,
    Surprise,
    summarize_feature,
)
from mlx_smolvlm.convert.compare.samples import PictureQuestion
from mlx_smolvlm.convert.names import list_entries
from mlx_smolvlm.convert.open_model import CheckpointReader
from mlx_smolvlm.media.encode import Medium

SURPRISES = 5
CONTEXT_TOKENS = 12  # shown before a surprise
TEXT_LAYER, VISION_LAYER = "text_model.layers", "vision_model.encoder.layers"


def compare_passages(a: Observation, b: Observation) -> list[Predictions]:
    """What both say about each passage."""
    return [
        compare_predictions((one, other), (a.head, b.head), passage.targets)
        for one, other, passage in zip(a.hidden, b.hidden, a.passages, strict=True)
    ]


def find_surprises(
    a: Observation, found: Sequence[Predictions], decode: Callable[[list[int]], str]
) -> tuple[Surprise, ...]:
    """The tokens of the texts where both differ most, from `found` of `compare_passages`."""
    places = [
        (float(kl), number, place)
        for number, part in enumerate(found[: a.num_texts])
        for place, kl in enumerate(part.kl_nats)
    ]
    result = []
    for kl, number, place in sorted(places, reverse=True)[:SURPRISES]:
        if kl == 0:
            break
        passage, (best, other) = a.passages[number], found[number].likeliest[:, place]
        end = passage.start + place
        before = passage.input_ids[max(0, end - CONTEXT_TOKENS) : end]
        result.append(
            Surprise(
                context=decode(before.tolist()),
                true=decode([int(passage.input_ids[end])]),
                reference=decode([int(best)]),
                other=decode([int(other)]),
                kl_nats=kl,
            )
        )
    return tuple(result)


def pair_answers(
    asked: Sequence[PictureQuestion], a: Observation, b: Observation
) -> tuple[AnswerPair, ...]:
    """Answers side by side."""
    result = []
    for question, one, other in zip(asked, a.answers, b.answers, strict=True):
        equal = [x == y for x, y in zip(one.token_ids, other.token_ids, strict=False)]
        longest = max(len(one.token_ids), len(other.token_ids))
        count = equal.index(False) if False in equal else len(equal)
        result.append(
            AnswerPair(question.text, question.name, one.text, other.text, longest, count)
        )
    return tuple(result)


def measure_decoder_layers(a: Observation, b: Observation) -> tuple[LayerLoss, ...]:
    """Errors of the states after each decoder layer; none if the decoders have other sizes."""
    text, other = a.config.text, b.config.text
    sizes = [(one.hidden_size, one.num_hidden_layers) for one in (text, other)]
    if sizes[0] != sizes[1]:
        return ()
    return tuple(
        LayerLoss(f"{TEXT_LAYER}.{number}", float(compute_relative_errors(x, y).mean()))
        for number, (x, y) in enumerate(zip(a.layers, b.layers, strict=True))
    )


def measure_pictures(
    a: Observation, b: Observation, media: Sequence[Medium]
) -> tuple[tuple[FeatureLoss, ...], tuple[LayerLoss, ...]]:
    """Errors of the features of pictures, and of the states after each encoder layer.

    A tile at a time goes through both encoders, so that few features are held. There are
    none if the checkpoints cut pictures in other ways or have other widths.
    """
    if not media or _list_encoder_settings(a.config) != _list_encoder_settings(b.config):
        return (), ()
    layers: list[list[float]] = []
    rows: list[tuple[np.ndarray, ...]] = []
    for medium in media:
        for _, tile in medium.make_tiles(b.config):
            pixels = mx.array(tile)[None]
            one, other = _encode_tile(a.encoder, pixels), _encode_tile(b.encoder, pixels)
            pairs = zip(one[2], other[2], strict=True)
            layers.append([float(compute_relative_errors(x, y).mean()) for x, y in pairs])
            both = [(one[0], other[0]), (one[1], other[1])]
            both = [pair for pair in both if pair[0].shape == pair[1].shape]
            rows.append(
                tuple(f(*pair) for pair in both for f in (compute_cosines, compute_relative_errors))
            )
            mx.clear_cache()
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    features = [summarize_feature("patch_features", *columns[:2])]
    if len(columns) > 2:
        features.append(summarize_feature("image_embeds", *columns[2:]))
    means = np.mean(layers, 0)
    named = (LayerLoss(f"{VISION_LAYER}.{i}", float(mean)) for i, mean in enumerate(means))
    return tuple(features), tuple(named)


def _list_encoder_settings(config: Config) -> tuple[object, ...]:
    """What of `config` has to be equal for its encoder's features to be comparable."""
    vision, image = config.vision, config.image
    sizes = (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers)
    return (*sizes, image.mean, image.std, image.longest_edge)


def _encode_tile(
    encoder: tuple[nn.Module, nn.Module], pixels: mx.array
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """`patch_features`, `image_embeds` and the states after every layer, of `pixels`."""
    vision, connector = encoder
    with record_outputs(vision.encoder.layers) as states:
        features = vision(pixels)
        embeds = connector(features)
        mx.eval(features, embeds, states)
    return features, embeds, states


def measure_matrices(
    a: CheckpointReader, b: CheckpointReader, step: Callable[[str], None]
) -> tuple[MatrixLoss, ...]:
    """Errors of every matrix that has the same shape in both, one read at a time.

    `step` is called with the path of each. The vision MLP may be padded in one of them.
    """
    paths = find_matrix_paths(a, b)
    result = []
    for path in paths:
        step(path)
        one, other = a.read_matrix(path), b.read_matrix(path)
        padded = path.startswith(VISION_LAYER) and ".mlp." in path
        if one.shape == other.shape or padded:
            bits = None if other.quantization is None else other.quantization.bits
            count = one.shape[0] * one.shape[1]
            result.append(MatrixLoss(path, bits, count, compute_frobenius_error(one, other)))
        del one, other
        mx.clear_cache()
    return tuple(result)


def find_matrix_paths(a: CheckpointReader, b: CheckpointReader) -> list[str]:
    """Paths of the modules that have a matrix in both."""
    others = {entry.path for entry in list_entries(b.config)}
    return [one.path for one in list_entries(a.config) if one.quantizable and one.path in others]
