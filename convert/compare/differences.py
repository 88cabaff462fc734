"""Computes the differences of two observed checkpoints; the reference comes first."""

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
CONTEXT_TOKENS = 12  # tokens that a surprise shows before it
TEXT_LAYER, VISION_LAYER = "text_model.layers", "vision_model.encoder.layers"


def compare_passages(a: Observation, b: Observation) -> list[Predictions]:
    """Compare the predictions of both for each passage."""
    return [
        compare_predictions((one, other), (a.head, b.head), passage.targets)
        for one, other, passage in zip(a.hidden, b.hidden, a.passages, strict=True)
    ]


def find_surprises(
    a: Observation, predictions: Sequence[Predictions], decode: Callable[[list[int]], str]
) -> tuple[Surprise, ...]:
    """Find the tokens of the texts where the predictions of both differ most.

    Args:
        a: The observation of the reference.
        predictions: The result of `compare_passages`.
        decode: Turns token ids into text.
    """
    places = [
        (float(kl), number, place)
        for number, part in enumerate(predictions[: a.num_texts])
        for place, kl in enumerate(part.kl_nats)
    ]
    result = []
    for kl, number, place in sorted(places, reverse=True)[:SURPRISES]:
        if kl == 0:
            break
        passage, (best, other) = a.passages[number], predictions[number].likeliest[:, place]
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
    questions: Sequence[PictureQuestion], a: Observation, b: Observation
) -> tuple[AnswerPair, ...]:
    """Pair the answers of both to each question."""
    result = []
    for question, one, other in zip(questions, a.answers, b.answers, strict=True):
        equal = [x == y for x, y in zip(one.token_ids, other.token_ids, strict=False)]
        longest = max(len(one.token_ids), len(other.token_ids))
        count = equal.index(False) if False in equal else len(equal)
        result.append(
            AnswerPair(question.text, question.name, one.text, other.text, longest, count)
        )
    return tuple(result)


def measure_decoder_layers(a: Observation, b: Observation) -> tuple[LayerLoss, ...]:
    """Measure the states after each decoder layer; empty if the decoders differ in size."""
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
    """Measure the features of pictures, and the states after each encoder layer.

    Each tile goes through both encoders before the next one, to keep few features in memory.
    Both results are empty if the encoders differ in size or pictures are resized differently.
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
    """List the settings that must be equal for features of two encoders to be comparable."""
    vision, image = config.vision, config.image
    sizes = (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers)
    return (*sizes, image.mean, image.std, image.longest_edge)


def _encode_tile(
    encoder: tuple[nn.Module, nn.Module], pixels: mx.array
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Return `patch_features`, `image_embeds` and the states after every layer."""
    vision, connector = encoder
    with record_outputs(vision.encoder.layers) as states:
        features = vision(pixels)
        embeds = connector(features)
        mx.eval(features, embeds, states)
    return features, embeds, states


def measure_matrices(
    a: CheckpointReader, b: CheckpointReader, step: Callable[[str], None]
) -> tuple[MatrixLoss, ...]:
    """Measure every matrix that has the same shape in both, one at a time.

    `step` is called with the path of each. The vision MLP may be padded in either checkpoint.
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
    """Return the paths of the modules that have a matrix in both."""
    others = {entry.path for entry in list_entries(b.config)}
    return [one.path for one in list_entries(a.config) if one.quantizable and one.path in others]
