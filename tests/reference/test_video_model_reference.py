"""From a video file to the answer, against transformers, through the converter, in float32."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from mlx_smolvlm.convert.run import convert_checkpoint  # noqa: E402
from mlx_smolvlm.generate.sampling import Sampling  # noqa: E402
from mlx_smolvlm.media.encode import encode, join_embeds  # noqa: E402
from mlx_smolvlm.prompt.messages import read_request  # noqa: E402
from mlx_smolvlm.smolvlm import load  # noqa: E402
from tests.helpers import model_pairs  # noqa: E402
from tests.helpers import video_cases as clips  # noqa: E402
from tests.helpers import video_oracle as videos  # noqa: E402

STATES = 1e-4
NEW_TOKENS = 24
SHORT = Sampling(max_tokens=NEW_TOKENS)
TILE = 64


class Pair:
    """A random SmolVLM2 and its processing, transformers' and ours."""

    def __init__(self, folder):
        case = replace(model_pairs.CASES["tied"], idefics3=False)
        made = model_pairs.make_pair(case, folder)
        edges = {"size": {"longest_edge": 4 * TILE}, "max_image_size": {"longest_edge": TILE}}
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": TILE}}
        (folder / "hf" / "video_preprocessor_config.json").write_text(
            json.dumps(
                {"max_image_size": {"longest_edge": TILE}, "video_sampling": sampling, **half}
            )
        )
        convert_checkpoint(folder / "hf", folder / "with videos")
        self.ours = load(folder / "with videos", dtype="float32")
        self.theirs = made.theirs
        tokenizer = made.processor.inner.tokenizer
        self.inputs = videos.VideoOracle(folder / "hf", tokenizer, 16, **edges, **half)

    def theirs_inputs(self, messages, files, pictures):
        """`input_ids` and the tiles of pictures and videos, in this order, as the messages are."""
        inputs = self.inputs(messages, [str(file) for file in files], pictures)
        # In transformers' processor the pixels of videos take the place of the pictures'.
        tiles = [inputs["pixel_values"].flatten(0, 1)]
        if pictures:
            images = self.inputs.processor.image_processor([pictures], return_tensors="pt")
            tiles.insert(0, images["pixel_values"][0])
        return {"input_ids": inputs["input_ids"], "pixel_values": torch.cat(tiles)[None]}

    def answer(self, inputs):
        """The greedy ids that follow."""
        with torch.no_grad():
            ids = self.theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.set_num_threads(1)
    return Pair(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of clips."""
    folder, paths = tmp_path_factory.mktemp("clips"), {}
    for name in ("ntsc", "60 fps portrait", "odd size", "0.3 s"):
        paths[name] = folder / f"{name}.mp4"
        paths[name].write_bytes(clips.data(name))
    return paths


PICTURE = Image.fromarray(clips.moving(700, (90, 70)))


def user(*items):
    return {"role": "user", "content": [item(one) for one in items]}


def item(one):
    return {"type": one[1:]} if one[0] == "+" else {"type": "text", "text": one}


@pytest.mark.parametrize(
    ("items", "names", "pictures"),
    [
        (("+video", "What happens?"), ("ntsc",), 0),
        (("+video", "What happens?"), ("60 fps portrait",), 0),
        (("+video", "What?"), ("0.3 s",), 0),
        (("+image", "+video", "Is it the same?"), ("odd size",), 1),
        (("A picture", "+image", "+image", " and", "+video", "?"), ("ntsc",), 2),
        (("+video", "+video", "Which?"), ("odd size", "odd size"), 0),
    ],
)
def test_logits_and_answer(pair, files, items, names, pictures):
    messages, paths = [user(*items)], [files[name] for name in names]
    images = [PICTURE.rotate(90 * number, expand=True) for number in range(pictures)]
    inputs = pair.theirs_inputs(messages, paths, images)

    request = read_request(messages, images, paths, None)
    opened = pair.ours.engine.open_media(request, "high")
    prompt = pair.ours.engine.make_prompt(request.messages, opened)
    assert prompt.input_ids.tolist() == inputs["input_ids"][0].tolist()
    for _ in encode(prompt.media, pair.ours.engine.encoder, pair.ours.config):
        pass
    logits = pair.ours.model(pair.ours.model.embed(prompt.input_ids, join_embeds(prompt.media)))
    with torch.no_grad():
        expected = pair.theirs(**inputs).logits.numpy()
    assert np.abs(np.array(logits) - expected).max() <= STATES

    reply = pair.ours.ask(messages, images=images, videos=paths, sampling=SHORT)
    assert reply.token_ids == pair.answer(inputs)
    assert reply.video_frames > 0


def test_the_usual_call(pair, files):
    """A question as text, beside a picture and a video: they come before it, in this order."""
    reply = pair.ours.ask(
        "Is it the same?", images=[PICTURE], videos=[files["odd size"]], sampling=SHORT
    )
    inputs = pair.theirs_inputs(
        [user("+image", "+video", "Is it the same?")], [files["odd size"]], [PICTURE]
    )
    assert reply.token_ids == pair.answer(inputs)


def test_later_turns_of_a_conversation(pair, files):
    chat = pair.ours.chat(sampling=SHORT)
    messages, paths = [], []
    for question, name in (("What happens?", "ntsc"), ("Why?", None), ("And here?", "ntsc")):
        items = (["+video"] if name else []) + [question]
        paths += [files[name]] if name else []
        messages = [*messages, user(*items)]
        reply = chat.ask(question, videos=[files[name]] if name else [])
        assert reply.token_ids == pair.answer(pair.theirs_inputs(messages, paths, []))
        said = {"role": "assistant", "content": [{"type": "text", "text": reply.text}]}
        messages = [*messages, said]


def test_what_is_seen_changes_the_answer(pair, files):
    """Else the tests above would pass without a video."""
    answers = {
        tuple(pair.ours.ask("What?", videos=[files[name]], sampling=SHORT).token_ids)
        for name in ("ntsc", "60 fps portrait")
    }
    assert len(answers) == 2
