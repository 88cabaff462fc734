"""Log-probabilities of choices against transformers' logits of whole transcripts, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mlx_smolvlm.generate.sampling import Sampling  # noqa: E402
from mlx_smolvlm.media.picture import open_image  # noqa: E402
from tests.helpers import model_pairs as pairs  # noqa: E402

CHOICES = ["red", "A red circle.", "no picture at all, only words", "3"]


@pytest.fixture(scope="module", params=sorted(pairs.CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    return pairs.make_pair(pairs.CASES[request.param], tmp_path_factory.mktemp("pair"))


def theirs(pair: Any, messages: list[dict[str, Any]], pictures: list[Any], choice: str) -> Any:
    """Log-probability of each token of `choice` and of its end."""
    prompt = pairs.theirs_inputs(pair, messages, pictures)["input_ids"].shape[1]
    answer = {"role": "assistant", "content": [{"type": "text", "text": choice}]}
    text = pair.processor.apply_chat_template([*messages, answer], tokenize=False)
    inputs = pair.processor(
        text=[text], images=[pictures] if pictures else None, return_tensors="pt"
    )
    inputs = {key: inputs[key] for key in ("input_ids", "pixel_values") if key in inputs}
    ids = inputs["input_ids"][0]
    end = int((ids == pair.theirs.generation_config.eos_token_id).nonzero()[-1]) + 1
    with torch.no_grad():
        logs = torch.log_softmax(pair.theirs(**inputs).logits[0], dim=-1)
    return logs[prompt - 1 : end - 1].gather(1, ids[prompt:end, None])[:, 0].numpy()


@pytest.mark.parametrize("names", [(), ("odd",), ("portrait", "RGBA")], ids=len)
def test_logprobs_of_choices(pair: Any, names: tuple[str, ...]) -> None:
    pictures = [open_image(pairs.PICTURES[name]()) for name in names]
    messages = pairs.prompt(len(names))
    expected = [theirs(pair, messages, pictures, choice) for choice in CHOICES]
    choice = pair.ours.choose(messages, CHOICES, images=pictures)
    assert choice.token_counts == tuple(one.size for one in expected)
    sums = np.array([one.sum(dtype=np.float64) for one in expected])
    assert np.abs(np.array(choice.logprobs) - sums).max() <= 1e-4
    weights = np.exp(sums - sums.max())
    np.testing.assert_allclose(choice.probabilities, weights / weights.sum(), atol=1e-4)
    means = np.exp(sums / choice.token_counts)
    by_tokens = pair.ours.choose(messages, CHOICES, images=pictures, normalize="tokens")
    np.testing.assert_allclose(by_tokens.probabilities, means / means.sum(), atol=1e-4)


def test_answers_together_are_those_of_transformers(pair: Any) -> None:
    picture = open_image(pairs.PICTURES["odd"]())
    questions = ["What?", "How many squares are there in it?", "Describe the picture."]
    replies = pair.ours.ask_many([picture], questions, sampling=Sampling(max_tokens=12))
    for question, reply in zip(questions, replies, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        inputs = pairs.theirs_inputs(pair, [{"role": "user", "content": content}], [picture])
        inputs = {key: inputs[key] for key in ("input_ids", "pixel_values")}
        with torch.no_grad():
            answer = pair.theirs.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert reply.token_ids == answer[0, inputs["input_ids"].shape[1] :].tolist()
