"""The training run of the demo checkpoint.

    python -m mlx_smolvlm.train.demo --out FOLDER [--from FOLDER] [--seed S] [--minutes N]

Four stages: the encoder alone on dense labels, conversations about pictures of one tile,
then pictures and clips together, brief clips first. With `--from`, only the last two, from
the weights of a checkpoint, after a few steps for the heads that no checkpoint has; give it
again to go on with such a run. A stage can be given
pictures cut into several tiles as well. A batch follows from the seed and its number, and
the schedule from the number of steps, so that a run which was stopped and goes on equals
one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_smolvlm.prompt import PromptBuilder
from mlx_smolvlm.train.batches import Batch, EncoderBatch, batch, encoder_batch
from mlx_smolvlm.train.clip_batches import ClipBatch, clip_batch
from mlx_smolvlm.train.encoder import start_encoder
from mlx_smolvlm.train.fast import fast_curves
from mlx_smolvlm.train.losses import Trainee, answer_loss, encoder_loss, mixed_loss
from mlx_smolvlm.train.optimizer import Optimizer
from mlx_smolvlm.train.shapes import demo_config
from mlx_smolvlm.train.tokenizer import build_tokenizer

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        size: Pictures in a batch.
        rate: Muon's learning rate at the top.
        tiled: Share of batches at full detail.
        frames: Sampled frames of the clips in a batch, about; 0 for no clips.
        longest: Sampled frames of a clip at most.
        heads_only: Whether the model stays as it is.
    """

    name: str
    steps: int
    size: int
    rate: float
    floor: float = 0.05
    encoder_share: float = 1.0
    tiled: float = 0.0
    frames: int = 0
    longest: int = 8
    heads_only: bool = False


STAGES = (
    Stage("encoder", steps=700, size=48, rate=0.012),
    Stage("single", steps=1900, size=16, rate=0.008, floor=0.02, encoder_share=0.4),
    Stage(
        "brief", steps=500, size=8, rate=0.006, floor=0.8, encoder_share=0.4, frames=20, longest=3
    ),
    Stage("clips", steps=2000, size=12, rate=0.006, floor=0.01, encoder_share=0.4, frames=28),
)
# Those of a run that begins with the weights of a checkpoint.
STAGES_FROM_WEIGHTS = (
    Stage("heads", steps=40, size=8, rate=0.01, frames=20, longest=3, heads_only=True),
    *STAGES[-2:],
)


class Run:
    """A training run: what is trained, by which optimizer, and how far it has come."""

    def __init__(self, builder: PromptBuilder, stages: tuple[Stage, ...], seed: int) -> None:
        mx.random.seed(seed)
        self.builder, self.stages, self.seed = builder, stages, seed
        self.trainee = Trainee(builder.config)
        sample = encoder_batch(seed + 999, builder.config, size=400)
        start_encoder(self.trainee.model.vision_model, sample.pixel_values)
        self.stage, self.step = 0, 0
        self._enter_stage()

    @property
    def done(self) -> bool:
        """Whether all stages are through."""
        return self.stage == len(self.stages)

    def _enter_stage(self) -> None:
        stage = self.stages[self.stage]
        self.trainee.unfreeze()
        if stage.heads_only:
            self.trainee.model.freeze()
        if stage.name == "encoder":
            self.trainee.freeze()
            self.trainee.model.vision_model.unfreeze()
            self.trainee.dense_head.unfreeze()
            self._gradient = nn.value_and_grad(self.trainee, encoder_loss)
        elif stage.frames:
            self._gradient = nn.value_and_grad(self.trainee, mixed_loss)
        else:
            self._gradient = nn.value_and_grad(self.trainee, answer_loss)
        self.optimizer = Optimizer()
        self.optimizer.init(self.trainee.trainable_parameters())

    def data(self) -> EncoderBatch | Batch | tuple[Batch, ClipBatch]:
        """The batch of the present step."""
        stage = self.stages[self.stage]
        seed = 10**9 * self.seed + 10**6 * (self.stage + 1) + self.step
        if stage.name == "encoder":
            return encoder_batch(seed, self.builder.config, stage.size)
        is_tiled = np.random.default_rng(seed).random() < stage.tiled
        pictures = batch(seed, self.builder, stage.size, "high" if is_tiled else "low")
        if stage.frames:
            return pictures, clip_batch(seed, self.builder, stage.frames, stage.longest)
        return pictures

    def advance(self) -> float:
        """One step; the loss before it."""
        stage = self.stages[self.stage]
        share = 0.5 + 0.5 * math.cos(math.pi * self.step / stage.steps)
        rate = stage.rate * (stage.floor + (1 - stage.floor) * share)
        self.optimizer.set_rates(rate * min(1, (self.step + 1) / 20), stage.encoder_share)
        with fast_curves():
            loss, gradient = self._gradient(self.trainee, self.data())
            self.optimizer.update(self.trainee, gradient)
            mx.eval(self.trainee.parameters(), self.optimizer.state, loss)
        self.step += 1
        if self.step == stage.steps:
            self.stage, self.step = self.stage + 1, 0
            if not self.done:
                self._enter_stage()
        return float(loss.item())

    def save(self, path: Path) -> None:
        """Write weights, the optimizer's state and the step to `path`, at once."""
        arrays = dict(
            tree_flatten({"trainee": self.trainee.parameters(), "optimizer": self.optimizer.state})
        )
        part = path.with_suffix(".part.safetensors")
        mx.save_safetensors(str(part), arrays, {"stage": str(self.stage), "step": str(self.step)})
        part.replace(path)

    def take_weights(self, folder: Path) -> None:
        """Begin with the weights of the checkpoint in `folder`."""
        weights: Any = mx.load(str(folder / "model.safetensors"))
        loaded = [(name, value.astype(mx.float32)) for name, value in weights.items()]
        self.trainee.model.load_weights(loaded, strict=True)

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote to `path`."""
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, place = loaded
        self.stage, self.step = int(place["stage"]), int(place["step"])
        if not self.done:
            self._enter_stage()
        state: Any = tree_unflatten(list(arrays.items()))
        self.trainee.update(state["trainee"])
        self.optimizer.state = state["optimizer"]


def save_checkpoint(run: Run, folder: Path) -> None:
    """Write the model as a checkpoint in float16; the tokenizer and template lie there already."""
    config = replace(run.builder.config, dtype="float16")
    parameters: Any = tree_flatten(run.trainee.model.parameters())
    weights = {name: value.astype(mx.float16) for name, value in parameters}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def start(folder: Path, seed: int, stages: tuple[Stage, ...] = STAGES) -> Run:
    """A run that writes to `folder`, with its tokenizer and template written there."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    builder = PromptBuilder(folder / "tokenizer.json", CHAT_TEMPLATE, demo_config(tokenizer))
    return Run(builder, stages, seed)


def main() -> None:
    """Train, log, save; go on where an earlier run into the same folder stopped."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--from", dest="weights", type=Path, help="folder of a checkpoint to begin with"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after so many of CPU time"
    )
    options = parser.parse_args()
    run = start(options.out, options.seed, STAGES_FROM_WEIGHTS if options.weights else STAGES)
    state, log = options.out / "state.safetensors", options.out / "log.csv"
    if state.exists():
        run.restore(state)
    else:
        if options.weights:
            run.take_weights(options.weights)
        log.write_text("stage,step,loss,cpu_s\n")
    losses: list[float] = []
    saved = time.process_time()
    while not run.done and time.process_time() < options.minutes * 60:
        name, step = run.stages[run.stage].name, run.step + 1
        losses.append(run.advance())
        if step % 50 == 0:
            with log.open("a") as file:
                file.write(f"{name},{step},{np.mean(losses):.4f},{time.process_time():.0f}\n")
            losses.clear()
        if time.process_time() - saved > 90:
            run.save(state)
            save_checkpoint(run, options.out)
            saved = time.process_time()
    run.save(state)
    save_checkpoint(run, options.out)


if __name__ == "__main__":
    main()
