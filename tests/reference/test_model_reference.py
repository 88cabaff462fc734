"""Every stage of the network against transformers, through the converter, in float32.

Random models are saved in the Hugging Face layout, with processor and tokenizer,
converted, loaded, and compared from the picture to the 32nd token.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mlx_smolvlm.generate.loop import prefill  # noqa: E402
from mlx_smolvlm.generate.sampling import Sampling  # noqa: E402
from mlx_smolvlm.media.picture import open_image  # noqa: E402
from mlx_smolvlm.media.tiles import tile_picture  # noqa: E402
from tests.helpers import recorder  # noqa: E402
from tests.helpers.model_pairs import (  # noqa: E402
    CASES,
    PICTURES,
    Pair,
    make_pair,
    prompt,
    theirs_inputs,
)

PIXELS, STATES = 1e-5, 1e-4
NEW_TOKENS = 32


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.set_num_threads(1)
    return make_pair(CASES[request.param], tmp_path_factory.mktemp("pair"))


def assert_close(ours: mx.array, theirs: Any, tolerance: float, name: str) -> None:
    ours, theirs = np.array(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape, name
    difference = np.abs(ours - theirs).max()
    assert difference <= tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("name", PICTURES)
def test_pixel_values(pair: Pair, name: str) -> None:
    picture = open_image(PICTURES[name]())
    ours = tile_picture(picture, pair.ours.config)
    inputs = theirs_inputs(pair, prompt(1), [picture])
    pixels = inputs["pixel_values"][0].permute(0, 2, 3, 1).numpy()
    assert ours.pixel_values.shape == pixels.shape
    assert np.abs(ours.pixel_values - pixels).max() <= PIXELS
    ids = pair.ours.engine.prompt_builder.build(prompt(1), [ours.grid])
    assert ids.tolist() == inputs["input_ids"][0].tolist()


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("odd",),
        ("portrait", "RGBA"),
        ("1x1", "EXIF", "panorama"),
        ("square", "gray", "CMYK", "palette"),
    ],
    ids=lambda names: f"{len(names)} pictures",
)
def test_every_stage_and_the_answer(pair: Pair, names: tuple[str, ...]) -> None:
    pictures = [open_image(PICTURES[name]()) for name in names]
    messages = prompt(len(names))
    inputs = theirs_inputs(pair, messages, pictures)
    inputs = {key: inputs[key] for key in ("input_ids", "pixel_values") if key in inputs}
    with torch.no_grad(), recorder.recorded(pair.theirs) as seen:
        logits = pair.theirs(**inputs).logits
    model = pair.ours.model

    image_embeds = None
    if pictures:
        pixel_values = np.concatenate(
            [tile_picture(p, pair.ours.config).pixel_values for p in pictures]
        )
        x = model.vision_model.embeddings(mx.array(pixel_values))
        assert_close(x, seen["patch embedding"], STATES, "patch embedding")
        for number, layer in enumerate(model.vision_model.encoder.layers):
            x = layer(x)
            assert_close(x, seen[f"encoder layer {number}"], STATES, f"encoder layer {number}")
        x = model.vision_model.post_layernorm(x)
        assert_close(x, seen["post_layernorm"], STATES, "post_layernorm")
        image_embeds = model.connector(x)
        assert_close(image_embeds, seen["connector"], STATES, "connector")
        for vlm in pair.both:
            whole = vlm.encode_images(pictures)
            assert whole is not None
            assert mx.abs(whole - image_embeds).max().item() <= STATES

    input_ids = inputs["input_ids"][0].numpy()
    embeds = model.embed(input_ids, image_embeds)
    assert_close(embeds, seen["merged embeddings"], STATES, "merged embeddings")
    positions = mx.array([0] * (model.text_model.rotary_rows + model.text_model.value_rows))
    x = embeds
    for number, layer in enumerate(model.text_model.layers):
        x = layer(x, positions, None)
        assert_close(x, seen[f"decoder layer {number}"], STATES, f"decoder layer {number}")
    assert_close(model.text_model.norm(x), seen["norm"], STATES, "norm")
    for vlm in pair.both:
        assert_close(vlm.model(embeds), logits, STATES, "logits")

    with torch.no_grad():
        answer = pair.theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = answer[0, input_ids.size :].tolist()
    for vlm in pair.both:
        reply = vlm.ask(messages, images=pictures, sampling=Sampling(max_tokens=NEW_TOKENS))
        assert reply.token_ids == expected

    # Random weights like to repeat a token, so the cache is also tried with random ones.
    forced = np.random.default_rng(0).integers(3, 600, NEW_TOKENS)
    inputs["input_ids"] = torch.tensor([[*input_ids.tolist(), *forced.tolist()]])
    with torch.no_grad():
        theirs = pair.theirs(**inputs).logits[0, input_ids.size :]
    for vlm in pair.both:
        cache = vlm.model.make_cache()
        prefill(vlm.model, embeds, cache)
        steps = [vlm.model.step(mx.array([token_id]), cache) for token_id in forced.tolist()]
        assert_close(mx.stack(steps), theirs, STATES, "decoded logits")
