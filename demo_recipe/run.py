"""The training run of the demo checkpoint.

    python -m demo_recipe --out FOLDER [--seed S] [--minutes N] [--workers N]
    mlx.launch -n 2 --backend ring -- python -m demo_recipe --out FOLDER

The first stage trains the encoder alone on dense labels. The second trains conversations about
pictures and clips, with additional tiles, most of which show print. Three stages about relations
follow, and then three about everything, with more of the weakest questions: the result is the mean
of the weights at the ends of these last three.

A batch depends on the seed and its number, and the schedule on the number of steps, so a resumed
run gives the same weights as one that was never stopped. The gradient of a step is the mean over
its parts, which one process computes in turn, or several processes in parallel. Workers are
processes that only draw data.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tokenizers import Tokenizer

from demo_recipe.ahead import Ahead
from demo_recipe.batches import (
    LATE_MIXES,
    LATE_SHARES,
    MIXES,
    PLAIN,
    PRINT_SHARES,
    SETTLED_MIXES,
    SETTLED_SHARES,
    EncoderBatch,
    Mix,
    PictureBatch,
    QuestionOptions,
    make_encoder_batch,
    make_picture_batch,
    pick_mix,
)
from demo_recipe.clip_batches import ClipBatch, make_clip_batch
from demo_recipe.encoder import start_encoder
from demo_recipe.fast import fast_curves
from demo_recipe.losses import PairedBatch, Trainee, encoder_loss, normalize_pixels, step_loss
from demo_recipe.optimizer import Optimizer
from demo_recipe.sample_clips import SAMPLED
from demo_recipe.shapes import make_demo_config
from demo_recipe.topics import Focus
from mlx_smolvlm.checkpoint.headers import load_tensors, read_metadata, save_tensors
from mlx_smolvlm.convert.hub import DEMO, resolve
from mlx_smolvlm.prompt.builder import PromptBuilder

SAVED_EVERY_S = 120
HEAD_STEPS, HEAD_RATE = 100, 0.02  # of heads that a checkpoint does not have
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
        steps: How many batches.
        rate: Muon's learning rate at the top.
        floor: Share of it that the last steps have.
        encoder_share: The encoder's rate, as a share.
        size: Tiles in a batch where the encoder is trained alone; 0 is conversations.
        clips: Share of batches about clips.
        frames: Sampled frames of the clips in a batch, about.
        brief: Share of the steps in which clips have three frames at most.
        parts: Batches whose mean gradient a step follows.
        mixes: What batches of pictures hold, with shares; none is `batches.MIXES`.
        asked: What is asked about pictures, and told beside the answers.
        tiles: Beside the conversations of a batch, most of them with print.
        scale: How many times the conversations of `batches.MIXES` a batch has.
        shares: Of the topics of those tiles.
        averaged: Whether the weights at its end count into the mean that is the run's result.
        from_average: Whether it begins with that mean, which then counts as one such end.
    """

    name: str
    steps: int
    rate: float
    floor: float = 0.05
    encoder_share: float = 1.0
    size: int = 0
    clips: float = 0.0
    frames: int = 24
    brief: float = 0.3
    parts: int = 1
    mixes: tuple[tuple[Mix, float], ...] = ()
    asked: QuestionOptions = PLAIN
    tiles: int = 0
    scale: int = 1
    shares: Mapping[str, float] = field(default_factory=lambda: PRINT_SHARES)
    averaged: bool = False
    from_average: bool = False


_SHAPES = (
    *((mix, 0.25 * share) for mix, share in MIXES),
    (Mix(("shapes",), 6, 8, detail="high"), 0.45),
    (Mix(("shapes",), 14, 5), 0.3),
)
_WEAKEST = (
    *((mix, 0.4 * share) for mix, share in MIXES),
    (Mix(("shapes",), 6, 8, detail="high"), 0.2),
    (Mix(("shapes",), 14, 5), 0.12),
    (Mix(("words",), 7, 6, detail="high"), 0.28),
)
RELATIONS = ("larger", "beside", "chart compare", "number")
WEAKEST = ("larger", "larger", "count", "word", "number")
_TOGETHER = Stage(
    "together", steps=1200, rate=0.004, floor=0.01, encoder_share=0.3, clips=0.16, brief=0.0,
    parts=2, asked=QuestionOptions(True, Focus(WEAKEST, 0.5, 80, True), True), tiles=12,
    averaged=True,
)  # fmt: skip
STAGES = (
    Stage("encoder", steps=7500, rate=0.014, size=256),
    Stage(
        "answers", steps=6000, rate=0.008, floor=0.01, encoder_share=0.5, clips=0.2, frames=96,
        asked=QuestionOptions(missing=True), tiles=64, scale=4,
    ),
    Stage(
        "relations", steps=654, rate=0.004, floor=0.01, encoder_share=0.3, clips=0.15, brief=0.0,
        parts=2, asked=QuestionOptions(True, Focus(RELATIONS), True), tiles=12,
    ),
    Stage(
        "sizes", steps=247, rate=0.004, floor=0.01, encoder_share=0.3, clips=0.12, brief=0.0,
        parts=2, asked=QuestionOptions(True, Focus(RELATIONS, 0.5, 80, True), True), tiles=12,
    ),
    Stage(
        "shapes", steps=740, rate=0.004, floor=0.01, encoder_share=0.2, clips=0.06, brief=0.0,
        parts=2, mixes=_SHAPES,
        asked=QuestionOptions(True, Focus(RELATIONS[:2], 0.6, 80, True), True),
    ),
    _TOGETHER,
    replace(
        _TOGETHER, name="weakest", steps=700, clips=0.06, mixes=_WEAKEST,
        asked=QuestionOptions(True, Focus(WEAKEST, 0.7, 80, True), True),
    ),
    replace(_TOGETHER, name="again", steps=450),
    Stage(
        "wider", steps=1700, rate=0.004, floor=0.01, encoder_share=0.5, clips=0.07, brief=0.0,
        mixes=LATE_MIXES, asked=QuestionOptions(True, Focus(WEAKEST, 0.25, 40, True), True),
        tiles=16, shares=LATE_SHARES, averaged=True, from_average=True,
    ),
    Stage(
        "settled", steps=620, rate=0.002, floor=0.01, encoder_share=0.4, clips=0.08, brief=0.0,
        mixes=SETTLED_MIXES, asked=QuestionOptions(True, Focus(WEAKEST, 0.25, 40, True), True),
        tiles=10, shares=SETTLED_SHARES, from_average=True,
    ),
)  # fmt: skip


Data = EncoderBatch | PictureBatch | ClipBatch | PairedBatch


Place = tuple[int, int, int]  # stage, step, part


def make_batch(builder: PromptBuilder, stages: tuple[Stage, ...], seed: int, place: Place) -> Data:
    """Draw the batch of one part of a step; all parts of a step are of the same kind."""
    number, step, part = place
    stage = stages[number]
    own = 10**9 * seed + 10**6 * (number + 1) + step
    if stage.size:
        return make_encoder_batch(own + 500_000 * part, builder.config, stage.size)
    kind = np.random.default_rng([own, 1])
    is_clip, mix = kind.random() < stage.clips, pick_mix(kind, stage.mixes)
    own += 500_000 * part
    if is_clip:
        longest = 3 if step < stage.brief * stage.steps else SAMPLED[-1]
        talk: PictureBatch | ClipBatch = make_clip_batch(
            own, builder, stage.frames, longest, stage.asked.missing
        )
    else:
        talk = make_picture_batch(own, builder, mix, stage.asked, stage.scale)
    if not stage.tiles:
        return talk
    return PairedBatch(
        talk, make_encoder_batch(own + 250_000, builder.config, stage.tiles, stage.shares)
    )


def draw_step(
    folder: Path,
    stages: tuple[Stage, ...],
    seed: int,
    share: tuple[int, int],
    place: tuple[int, int],
) -> list[Data]:
    """Draw the batches of a step for one process; a step of one part is drawn by every process.

    Args:
        share: The process's number, and how many there are.
        place: Stage and step.
    """
    (rank, size), parts = share, stages[place[0]].parts
    if parts > 1 and parts % size:
        raise ValueError(f"{size} processes cannot share the {parts} parts of a step")
    own = range(rank, parts, size) if parts > 1 else range(1)
    return [make_batch(load_builder(folder), stages, seed, (*place, part)) for part in own]


def choose_curves() -> AbstractContextManager[None]:
    """Return the context to compute in: with fast curves on a CPU."""
    return fast_curves() if mx.default_device() == mx.Device(mx.cpu) else nullcontext()


class Run:
    """A training run: the model, the optimizer, and the current stage and step.

    Args:
        folder: The folder of the tokenizer.
        workers: The number of processes that draw data.
    """

    def __init__(
        self, folder: Path, stages: tuple[Stage, ...], seed: int, workers: int = 0
    ) -> None:
        mx.random.seed(seed)
        builder = load_builder(folder)
        self.builder, self.stages, self.seed = builder, stages, seed
        self.trainee = Trainee(builder.config)
        self.group = mx.distributed.init()  # of this process alone, unless several were launched
        sample = make_encoder_batch(seed + 999, builder.config, size=400)
        start_encoder(
            self.trainee.model.vision_model,
            np.array(normalize_pixels(sample.pixels, builder.config.image)),
        )
        share = self.group.rank(), self.group.size()
        self._ahead = Ahead(
            partial(draw_step, folder, stages, seed, share), self._find_next, workers
        )
        self.stage, self.step = 0, 0
        self.ends = 0
        self._average: dict[str, Any] = self.trainee.model.parameters()
        self._enter_stage()

    @property
    def is_done(self) -> bool:
        """Whether all stages are finished."""
        return self.stage == len(self.stages)

    @property
    def result(self) -> dict[str, Any]:
        """The current weights; at the end, the mean of ends if the last stage counts into it."""
        mean = self.is_done and self.stages[-1].averaged
        weights: dict[str, Any] = self._average if mean else self.trainee.model.parameters()
        return weights

    def _add_to_average(self) -> None:
        """Add the model's weights to the average."""
        self.ends += 1
        self._average = tree_map(
            lambda mean, here: mean + (here - mean) / self.ends,
            self._average,
            self.trainee.model.parameters(),
        )
        mx.eval(self._average)

    def _enter_stage(self) -> None:
        stage = self.stages[self.stage]
        if stage.from_average and self.ends:
            self.trainee.model.update(self._average)
            self.ends = 1
        self.trainee.unfreeze()
        if stage.size:
            self.trainee.freeze()
            self.trainee.model.vision_model.unfreeze()
            self.trainee.dense_head.unfreeze()
        loss = encoder_loss if stage.size else step_loss
        self._gradient = nn.value_and_grad(self.trainee, loss)
        self.optimizer = Optimizer()
        self.optimizer.init(self.trainee.trainable_parameters())

    def begin_at(self, name: str, checkpoint: Path) -> None:
        """Begin at the stage `name` with the weights of `checkpoint`.

        A checkpoint has no auxiliary heads: new ones are fitted to it first.
        """
        self.stage = [stage.name for stage in self.stages].index(name)
        weights = load_tensors(checkpoint / "model.safetensors")
        self.trainee.model.load_weights(
            [(key, value.astype(mx.float32)) for key, value in weights.items()]
        )
        self._fit_heads()
        self._enter_stage()

    def _fit_heads(self) -> None:
        """Train the auxiliary heads alone, on batches of the current stage."""
        self.trainee.freeze()
        for head in (self.trainee.dense_head, self.trainee.motion_head, self.trainee.place_head):
            head.unfreeze()
        optimizer = Optimizer()
        optimizer.init(self.trainee.trainable_parameters())
        gradient = nn.value_and_grad(self.trainee, step_loss)
        for step in range(HEAD_STEPS):
            data = make_batch(self.builder, self.stages, self.seed + 1, (self.stage, step, 0))
            optimizer.set_rates(HEAD_RATE * (1 - step / HEAD_STEPS), 1.0)
            with choose_curves():
                loss, slope = gradient(self.trainee, data)
                optimizer.update(self.trainee, slope)
                mx.eval(self.trainee.parameters(), optimizer.state, loss)

    def advance(self) -> float:
        """Take one step, and return the loss before it."""
        value: float = self.begin().item()  # type: ignore[assignment]
        return value

    def begin(self) -> mx.array:
        """Start one step, and return the loss before it without waiting for either."""
        data = self._ahead.get((self.stage, self.step))
        stage = self.stages[self.stage]
        share = 0.5 + 0.5 * math.cos(math.pi * self.step / stage.steps)
        rate = stage.rate * (stage.floor + (1 - stage.floor) * share)
        self.optimizer.set_rates(rate * min(1, (self.step + 1) / 20), stage.encoder_share)
        with choose_curves():
            loss, gradient = self._compute_gradient(data, stage.parts)
            self.optimizer.update(self.trainee, gradient)
            mx.async_eval(self.trainee.parameters(), self.optimizer.state, loss)
        self.step += 1
        if self.step == stage.steps:
            if stage.averaged:
                self._add_to_average()
            self.stage, self.step = self.stage + 1, 0
            if not self.is_done:
                self._enter_stage()
        return loss

    def check_any(self, wish: bool) -> bool:
        """Return whether `wish` is true in any process; every process gets the same value."""
        wishes: Any = mx.distributed.all_sum(mx.array(float(wish)))
        return bool(wishes.item())

    def _compute_gradient(self, data: list[Data], parts: int) -> tuple[mx.array, Any]:
        """Return the mean loss and gradient over the parts of a step; `data` is this process's."""
        loss, gradient = self._gradient(self.trainee, data[0])
        for one in data[1:]:
            mx.eval(loss, gradient)
            more = self._gradient(self.trainee, one)
            loss, gradient = loss + more[0], tree_map(mx.add, gradient, more[1])
        if self.group.size() > 1 and parts > 1:
            loss = mx.distributed.all_sum(loss)
            gradient = tree_map(mx.distributed.all_sum, gradient)
        return loss / parts, tree_map(lambda g: g / parts, gradient)

    def _find_next(self, place: tuple[int, int]) -> tuple[int, int] | None:
        """Return the stage and step after `place`, or None after the last."""
        number, step = place
        if step + 1 < self.stages[number].steps:
            return number, step + 1
        return (number + 1, 0) if number + 1 < len(self.stages) else None

    def save(self, path: Path) -> None:
        """Write weights, average, optimizer state and step to `path` atomically."""
        state = {"trainee": self.trainee.parameters(), "optimizer": self.optimizer.state}
        if self.ends:
            state["average"] = self._average
        place = {"stage": str(self.stage), "step": str(self.step), "ends": str(self.ends)}
        save_tensors(path, dict(tree_flatten(state)), place)

    def restore(self, path: Path) -> None:
        """Continue from the state that `save` wrote to `path`."""
        arrays, place = load_tensors(path), read_metadata(path)
        self.stage, self.step = int(place["stage"]), int(place["step"])
        if not self.is_done:
            self._enter_stage()
        state: Any = tree_unflatten(list(arrays.items()))
        self.trainee.update(state["trainee"])
        if self.step:
            self.optimizer.state = state["optimizer"]
        self.ends = int(place["ends"])
        if self.ends:
            self._average = state["average"]


def save_checkpoint(run: Run, folder: Path) -> None:
    """Write the weights in float16 and the configuration; `start` wrote the other files."""
    config = replace(run.builder.config, dtype="float16")
    parameters: Any = tree_flatten(run.result)
    weights = {name: value.astype(mx.float16) for name, value in parameters}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def start(folder: Path, seed: int, stages: tuple[Stage, ...] = STAGES, workers: int = 0) -> Run:
    """Write the tokenizer and template to `folder`, and return a run in it.

    The tokenizer is the shipped one: weights fit its ids only, and a newly trained tokenizer
    would change with every change of the questions.
    """
    group = mx.distributed.init()
    if group.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(resolve(DEMO) / "tokenizer.json", folder)
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    mx.eval(mx.distributed.all_sum(mx.array(1.0)))  # the others wait until it is there
    return Run(folder, stages, seed, workers)


@lru_cache(maxsize=4)
def load_builder(folder: Path) -> PromptBuilder:
    """Return a prompt builder with the tokenizer in `folder`."""
    path = folder / "tokenizer.json"
    return PromptBuilder(path, CHAT_TEMPLATE, make_demo_config(Tokenizer.from_file(str(path))))


def main() -> None:
    """Train, log and save; resume an earlier run in the same folder."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw")
    parser.add_argument("--until", choices=[s.name for s in STAGES], help="stop after this stage")
    parser.add_argument("--begin", choices=[s.name for s in STAGES], help="begin at this stage")
    parser.add_argument("--weights", default=DEMO, help="checkpoint to begin with")
    options = parser.parse_args()
    run = start(options.out, options.seed, workers=options.workers)
    state, log = options.out / "state.safetensors", options.out / "log.csv"
    if state.exists():
        run.restore(state)
    else:
        log.write_text("stage,step,loss,seconds\n")
        if options.begin:
            run.begin_at(options.begin, resolve(options.weights))
    losses: list[mx.array] = []
    saved = begun = time.monotonic()
    while not run.is_done and not run.check_any(time.monotonic() - begun > options.minutes * 60):
        name, step = run.stages[run.stage].name, run.step + 1
        losses.append(run.begin())
        mx.eval(losses[-2:-1])  # so that one step is computed while the next is prepared
        if run.step == 0 and name == options.until:
            break
        if run.group.rank():
            del losses[:-1]
            continue  # the first process writes for all
        if step % 50 == 0:
            mean = float(mx.stack(losses).mean())
            with log.open("a") as file:
                file.write(f"{name},{step},{mean:.4f},{time.monotonic() - begun:.0f}\n")
            losses.clear()
        if time.monotonic() - saved > SAVED_EVERY_S:
            run.save(state)
            save_checkpoint(run, options.out)
            saved = time.monotonic()
    if not run.group.rank():
        run.save(state)
        save_checkpoint(run, options.out)


if __name__ == "__main__":
    main()
