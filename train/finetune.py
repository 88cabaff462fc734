"""Fine-tunes a checkpoint into a folder, and resumes an earlier run in that folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_smolvlm.checkpoint.lora import AdapterConfig, compute_signature, save_adapter
from mlx_smolvlm.errors import DatasetError, TrainingError
from mlx_smolvlm.files import append_file, lock, read_file, remove_leftovers, write_file
from mlx_smolvlm.smolvlm import SmolVLM, load_in_mlx
from mlx_smolvlm.train.batches import (
    BatchLoader,
    BatchOrder,
    EmbeddingCache,
    MediaOptions,
    build_row,
    measure_media,
)
from mlx_smolvlm.train.dataset import Example, read_dataset
from mlx_smolvlm.train.loop import Loop, LoopOptions, Schedule, StepReport, read_notes
from mlx_smolvlm.train.loss import answer_loss, checkpointed_loss
from mlx_smolvlm.train.parameters import (
    freeze_other_parts,
    fuse,
    mark_as_tuned,
    start_adapter,
    trains_encoder,
    write_model,
)
from mlx_smolvlm.train.settings import Settings

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"
ADAPTER, MODEL, FUSED = "adapter", "model", "fused"
OWN_NAMES = (STATE_FILE, LOG_FILE, ADAPTER, MODEL, FUSED)

LARGEST_LOG = 2**30  # bytes


def check_folder(out: Path) -> None:
    """Create the folder `out`, or refuse it if it has files that are not of a training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(one.name for one in out.iterdir())
    except FileExistsError:
        raise TrainingError(f"{out} is not a folder; choose another with --out") from None
    except (OSError, ValueError) as error:  # a name with a NUL character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(f"{out} cannot be used: {reason}; choose another with --out") from None
    others = [name for name in names if name not in OWN_NAMES and not name.startswith(".")]
    if others:
        raise TrainingError(
            f"{out} holds {others[0]!r}, which is not a training's file; choose another folder "
            "with --out"
        )


def lock_folder(out: Path) -> int:
    """Lock the folder against other trainings, and remove the temporary files of killed ones.

    Returns:
        A file descriptor; closing it unlocks the folder.

    Raises:
        TrainingError: Another process has locked the folder.
    """
    try:
        descriptor = lock(out)
    except BlockingIOError:
        raise TrainingError(f"another training is writing to {out}; wait for it") from None
    for folder in (out, out / ADAPTER):
        remove_leftovers(folder, older_than_s=0)
    return descriptor


@contextmanager
def report_write_errors(out: Path) -> Iterator[None]:
    """Turn an `OSError` inside the context into a `TrainingError`.

    Raises:
        TrainingError: A file cannot be written; the state saved before is intact.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{error.filename or out} cannot be written: {error.strerror or error}; after fixing "
            "that, the same command goes on from the last saved state"
        ) from None


def check_same(path: Path, stored: dict[str, str], own: dict[str, str]) -> None:
    """Refuse to resume from a state of other settings, data or weights.

    Args:
        path: The state's file, for messages.
        stored: The notes of the state: "settings", "data" and "base".
        own: The notes of this training.

    Raises:
        TrainingError: They differ, or `stored` is damaged.
    """
    advice = "choose another folder with --out, or remove this one"
    try:
        old = json.loads(stored.get("settings", "{}"))
    except (ValueError, RecursionError):
        old = None
    if not isinstance(old, dict):
        raise TrainingError(f"{path} is damaged; {advice}")
    new = json.loads(own["settings"])
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise TrainingError(
                f"{path} is of a training whose {name:.40} was {json.dumps(old.get(name)):.200}, "
                f"and now it is {json.dumps(new.get(name)):.200}; {advice}"
            )
    for name, what in (("data", "the data"), ("base", "the checkpoint")):
        if stored.get(name) != own[name]:
            raise TrainingError(f"{what} changed since {path} was written; {advice}")


def rewind(log: Path, step: int) -> None:
    """Remove the lines of `log` that are after `step` or incomplete; create it if missing."""
    lines = []
    if os.path.lexists(log):
        try:
            data = read_file(log, LARGEST_LOG)
        except OSError as error:
            raise TrainingError(f"{log} cannot be read: {error.strerror}; remove it") from None
        for line in data.decode(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                if json.loads(line)["step"] <= step and step > 0:
                    lines.append(line + "\n")
    with report_write_errors(log):
        write_file(log, "".join(lines), follow_links=False)


@dataclass(frozen=True)
class TrainingData:
    """Examples that are short enough.

    Attributes:
        examples: The examples.
        lengths: The length of each in tokens.
        skipped: How many were too long.
    """

    examples: tuple[Example, ...]
    lengths: tuple[int, ...]
    skipped: int


@dataclass(frozen=True)
class TuningEvent:
    """What `Tuning.run` yields: a step, or the evaluation before the first step.

    Attributes:
        report: The figures of the step; None for the evaluation before the first.
        valid_loss: The loss on the held-out examples; None if they were not evaluated.
        tokens: The tokens of the step's rows, without padding.
    """

    report: StepReport | None
    valid_loss: float | None
    tokens: int = 0


def measure_examples(
    vlm: SmolVLM, examples: Sequence[Example], media_options: MediaOptions, settings: Settings
) -> TrainingData:
    """Tokenize every example once, without decoding pictures, and select the short enough ones.

    Raises:
        DatasetError: An example is too long and the settings do not skip it, a picture or video
            cannot be read, or no example is left.
    """
    context = vlm.config.text.max_position_embeddings
    limit = min(context, settings.max_tokens or context)
    short, lengths = [], []
    for example in examples:
        media = measure_media(vlm, example, media_options)
        length = build_row(vlm.engine.prompt_builder, example, media).ids.size
        if length <= limit:
            short.append(example)
            lengths.append(length)
        elif settings.too_long == "error":
            raise DatasetError(
                f"{example.where}: it takes {length:,} tokens, but the limit is {limit:,}; raise "
                f'max_tokens (the context is {context:,}), use a lower detail, or too_long = "skip"'
            )
    if not short:
        raise DatasetError(f"no example of {examples[0].file} fits into {limit:,} tokens")
    return TrainingData(tuple(short), tuple(lengths), len(examples) - len(short))


class Tuning:
    """A fine-tuning with its model and data loaded and its folder locked.

    Attributes:
        settings: The settings.
        out: The folder.
        vlm: The checkpoint; training changes its model in place.
        loop: The training loop.
        example_count: Examples to train on, of all datasets.
        skipped_count: Examples left out because they are too long.
        total_steps: Steps of the whole training.
    """

    def __init__(self, settings: Settings, out: Path, offline: bool = False) -> None:
        """Load the model, read the data, and resume from the folder's state if there is one.

        Args:
            settings: The settings.
            out: The folder to write to; it is created if needed.
            offline: Do not download the model.

        Raises:
            TrainingError: The folder is in use, holds other files, or its state is of another
                training.
            DatasetError: An example cannot be used.
            CheckpointError: The model cannot be loaded.
        """
        self.settings, self.out = settings, out
        self._loaders: list[BatchLoader] = []
        check_folder(out)
        self._lock = lock_folder(out)
        try:
            self._prepare(offline)
            self._resume()
        except BaseException:
            self.close()
            raise

    def _prepare(self, offline: bool) -> None:
        """Load the model and the data, and create the loop; raises as the constructor."""
        settings = self.settings
        datasets = [read_dataset(settings.resolve_path(one.path)) for one in settings.data]
        held_out = self._read_held_out()
        dtype = settings.dtype or ("float32" if settings.method == "full" else None)
        local = settings.resolve_path(settings.model)
        # Path.is_dir raises if a name is too long, as a model name may be.
        name = local if os.path.isdir(local) else settings.model
        self.vlm = vlm = load_in_mlx(name, offline=offline, dtype=dtype)
        self._notes = self._compute_identity(datasets)
        media_options = MediaOptions(settings.detail, settings.fps, settings.max_frames)  # type: ignore[arg-type]
        data = [measure_examples(vlm, examples, media_options, settings) for examples in datasets]
        valid = measure_examples(vlm, held_out, media_options, settings) if held_out else None
        self.example_count = sum(len(one.examples) for one in data)
        self.skipped_count = sum(one.skipped for one in (*data, valid) if one is not None)
        self.total_steps = self._count_steps()
        self._adapter = self._choose_parameters()
        cache = None if trains_encoder(vlm.model) else EmbeddingCache(vlm)
        self._loader = self._make_loader(data, media_options, cache)
        self._valid = self._make_valid(valid, media_options, cache)
        self.loop = self._make_loop()

    def _choose_parameters(self) -> AdapterConfig | None:
        """Freeze all other parameters; return the new adapter's configuration if there is one."""
        settings, vlm = self.settings, self.vlm
        mx.random.seed(settings.seed)
        if settings.method == "lora":
            source = vlm.config.source
            return start_adapter(vlm.model, settings.trained_parts, settings.lora, source)
        freeze_other_parts(vlm.model, settings.trained_parts)
        return None

    @property
    def parameter_count(self) -> int:
        """The number of parameters that are trained."""
        parameters: Any = tree_flatten(self.vlm.model.trainable_parameters())
        return sum(int(array.size) for _, array in parameters)

    @property
    def result(self) -> Path:
        """The folder of the adapter or of the trained model."""
        return self.out / (ADAPTER if self._adapter else MODEL)

    def run(self) -> Iterator[TuningEvent]:
        """Take the remaining steps, and evaluate, save and log as often as the settings say.

        The result is saved after the last step. If you stop earlier, call `save`.

        Raises:
            TrainingError: The loss is infinite or not a number, or a file cannot be written.
            DatasetError: A picture or video cannot be decoded.
        """
        settings = self.settings
        if self.loop.step == 0 and self._valid is not None:
            yield self._log(TuningEvent(None, self.evaluate()))
        for report in self.loop.run():
            is_last = self.loop.is_done
            is_due = is_last or report.step % settings.evaluate_every == 0
            loss = self.evaluate() if is_due and self._valid is not None else None
            event = self._log(TuningEvent(report, loss, self._loader.take_tokens()))
            if is_last or report.step % settings.save_every == 0:
                self.save()
            yield event

    def evaluate(self) -> float:
        """Return the mean loss per token of the held-out answers."""
        assert self._valid is not None
        loader, batches = self._valid
        self.vlm.model.eval()
        total = weight = mx.array(0.0)
        for number in range(batches):
            value, count = answer_loss(self.vlm.model, loader.load_batch(number))
            total, weight = total + value, weight + count
            mx.eval(total, weight)
        return float((total / weight).item())  # type: ignore[arg-type]

    def save(self) -> None:
        """Write the adapter or model, then the state to resume from.

        Raises:
            TrainingError: A file cannot be written, for example because the disk is full.
            CheckpointError: The same, for the files of a whole model.
        """
        model = self.vlm.model
        with report_write_errors(self.out):
            if self._adapter is not None:
                save_adapter(model, self.result, self._adapter)
            else:
                write_model(model, self.vlm.path, mark_as_tuned(self.vlm.config), self.result)
            self.loop.save(self.out / STATE_FILE, self._notes)

    def fuse(self) -> Path:
        """Write a checkpoint of the base with the adapter, and return its folder.

        Raises:
            TrainingError: There is no adapter.
        """
        if self._adapter is None:
            raise TrainingError(
                "method full has no adapter to fuse: it writes a whole model already"
            )
        return fuse(self.vlm.path, self.result, self.out / FUSED)

    def close(self) -> None:
        """End the threads and unlock the folder."""
        for loader in self._loaders:
            loader.close()
        os.close(self._lock)

    def _compute_identity(self, datasets: Sequence[Sequence[Example]]) -> dict[str, str]:
        """Return the notes that must be equal for a state to be resumed.

        Media count by their sizes alone, since reading all of them could take minutes.
        """
        digest = hashlib.blake2b(digest_size=16)
        for examples in datasets:
            data = examples[0].file.read_bytes()
            digest.update(b"%d\n" % len(data) + data)
            for path in [path for one in examples for path in (*one.images, *one.videos)]:
                digest.update(b"%d\n" % path.stat().st_size)
        base = json.dumps([self.vlm.config.to_dict(), compute_signature(self.vlm.model)])
        return {
            "settings": json.dumps(self.settings.dump_decisive()),
            "data": digest.hexdigest(),
            "base": hashlib.blake2b(base.encode(), digest_size=16).hexdigest(),
        }

    def _read_held_out(self) -> list[Example]:
        """Read the examples to evaluate on: of `valid`, or of each valid.jsonl in a data folder."""
        settings = self.settings
        if settings.valid is not None:
            return read_dataset(settings.resolve_path(settings.valid), "valid")
        folders = [settings.resolve_path(one.path) for one in settings.data]
        folders = [one for one in folders if (one / "valid.jsonl").is_file()]
        return [example for one in folders for example in read_dataset(one, "valid")]

    def _count_steps(self) -> int:
        settings = self.settings
        if settings.steps is not None:
            return settings.steps
        assert settings.epochs is not None
        return math.ceil(
            settings.epochs * self.example_count / settings.batch_size / settings.accumulate
        )

    def _make_loader(
        self,
        data: Sequence[TrainingData],
        media_options: MediaOptions,
        cache: EmbeddingCache | None,
    ) -> BatchLoader:
        settings, count = self.settings, self.total_steps * self.settings.accumulate
        weights = [one.weight for one in settings.data if one.weight is not None]
        lengths = [one.lengths for one in data]
        order = BatchOrder(lengths, weights or None, settings.batch_size, count, settings.seed)

        def select_examples(number: int) -> list[Example]:
            return [data[d].examples[i] for d, i in order.get_batch(number)]

        self._loaders.append(BatchLoader(self.vlm, select_examples, count, media_options, cache))
        return self._loaders[-1]

    def _make_valid(
        self,
        data: TrainingData | None,
        media_options: MediaOptions,
        cache: EmbeddingCache | None,
    ) -> tuple[BatchLoader, int] | None:
        """Return a loader of the held-out examples, sorted by length, and its number of batches."""
        if data is None:
            return None
        size = self.settings.batch_size
        order = sorted(range(len(data.examples)), key=lambda i: data.lengths[i])
        count = math.ceil(len(order) / size)

        def select_examples(number: int) -> list[Example]:
            return [data.examples[i] for i in order[number * size : (number + 1) * size]]

        self._loaders.append(BatchLoader(self.vlm, select_examples, count, media_options, cache))
        return self._loaders[-1], count

    def _make_loop(self) -> Loop:
        settings, adamw = self.settings, self.settings.optimizer
        schedule = Schedule(adamw.rate, self.total_steps, adamw.warmup, adamw.schedule, adamw.floor)  # type: ignore[arg-type]
        options = LoopOptions(schedule, settings.accumulate, adamw.clip or None, settings.seed)
        loss = checkpointed_loss if settings.checkpoint_gradients else answer_loss
        optimizer = optim.AdamW(adamw.rate, weight_decay=adamw.weight_decay, bias_correction=True)
        return Loop(self.vlm.model, loss, optimizer, self._loader.load_batch, options)

    def _resume(self) -> None:
        """Restore the folder's state, if there is one and it is of this training."""
        path = self.out / STATE_FILE
        if path.exists():
            check_same(path, read_notes(path), self._notes)
            self.loop.restore(path)
        rewind(self.out / LOG_FILE, self.loop.step)

    def _log(self, event: TuningEvent) -> TuningEvent:
        """Append `event` to the log, and return it."""
        report = event.report
        values: dict[str, Any] = {"step": report.step if report else 0}
        if report is not None:
            values |= {"loss": report.loss, "rate": report.rate, "norm": report.norm}
            values |= {"tokens": event.tokens, "targets": int(report.weight)}
            values |= {"seconds": round(report.seconds, 4)}
        if event.valid_loss is not None:
            values["valid_loss"] = event.valid_loss
        log = self.out / LOG_FILE
        with report_write_errors(log):
            append_file(log, json.dumps(values) + "\n")
        return event
