"""A fine-tuning from its settings to a folder, resumed where an earlier run of it stopped."""

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
from mlx_smolvlm.smolvlm import SmolVLM, load
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
    """Refuse a folder that holds something else than a training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(one.name for one in out.iterdir())
    except FileExistsError:
        raise TrainingError(f"{out} is no folder; choose another with --out") from None
    except (OSError, ValueError) as error:  # a name with a NUL character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(f"{out} cannot be used: {reason}; choose another with --out") from None
    others = [name for name in names if name not in OWN_NAMES and not name.startswith(".")]
    if others:
        raise TrainingError(
            f"{out} holds {others[0]!r}, which is of no training; choose another folder with --out"
        )


def lock_folder(out: Path) -> int:
    """A descriptor that keeps other trainings out of the folder; what killed ones left goes."""
    try:
        descriptor = lock(out)
    except BlockingIOError:
        raise TrainingError(f"another training is writing to {out}; wait for it") from None
    for folder in (out, out / ADAPTER):
        remove_leftovers(folder, older_than_s=0)
    return descriptor


@contextmanager
def report_write_errors(out: Path) -> Iterator[None]:
    """Within it, what the system refuses to write is said in one line.

    Raises:
        TrainingError: It names the file and the reason; what was saved before is whole.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{error.filename or out} cannot be written: {error.strerror or error}; see to "
            "that, and the same command goes on from what was saved last"
        ) from None


def check_same(path: Path, stored: dict[str, str], own: dict[str, str]) -> None:
    """Refuse to go on from a state that other settings, data or weights led to."""
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
    """Take from `log` what came after `step`, or was not written to its end."""
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
    """Examples that fit, with their lengths in tokens, and how many were left out."""

    examples: tuple[Example, ...]
    lengths: tuple[int, ...]
    skipped: int


@dataclass(frozen=True)
class TuningEvent:
    """A step that was made, or an evaluation before the first one (`report` is None).

    `valid_loss` is of the held-out examples, if it was their turn; `tokens` are those of the
    step's rows, without what fills them up.
    """

    report: StepReport | None
    valid_loss: float | None
    tokens: int = 0


def measure_examples(
    vlm: SmolVLM, examples: Sequence[Example], media_options: MediaOptions, settings: Settings
) -> TrainingData:
    """The examples that are short enough; every prompt is made once, no picture decoded.

    Raises:
        DatasetError: An example is too long and the settings do not say to skip it, a medium
            cannot be read, or no example is left.
    """
    context = vlm.config.text.max_position_embeddings
    limit = min(context, settings.max_tokens or context)
    kept, lengths = [], []
    for example in examples:
        media = measure_media(vlm, example, media_options)
        length = build_row(vlm.engine.prompt_builder, example, media).ids.size
        if length <= limit:
            kept.append(example)
            lengths.append(length)
        elif settings.too_long == "error":
            raise DatasetError(
                f"{example.where}: it takes {length:,} tokens, and {limit:,} are the most; raise "
                f'max_tokens (the context is {context:,}), use a lower detail, or too_long = "skip"'
            )
    if not kept:
        raise DatasetError(f"no example of {examples[0].file} fits into {limit:,} tokens")
    return TrainingData(tuple(kept), tuple(lengths), len(examples) - len(kept))


class Tuning:
    """A training that is ready to run, its folder locked.

    `total` steps are to be made on `examples`; `skipped` ones are too long.
    """

    def __init__(self, settings: Settings, out: Path, offline: bool = False) -> None:
        """Load the model, read the data, and go on from the folder's state if there is one.

        Raises:
            TrainingError: The folder is taken, or its state is of another training.
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
        """Model, data and loop; errors as the constructor."""
        settings = self.settings
        datasets = [read_dataset(settings.resolve_path(one.path)) for one in settings.data]
        held_out = self._read_held_out()
        dtype = settings.dtype or ("float32" if settings.method == "full" else None)
        local = settings.resolve_path(settings.model)
        # Path.is_dir raises where a name is too long, as that of a hub's model may be.
        name = local if os.path.isdir(local) else settings.model
        self.vlm = vlm = load(name, offline=offline, dtype=dtype)
        self._notes = self._compute_identity(datasets)
        media_options = MediaOptions(settings.detail, settings.fps, settings.max_frames)  # type: ignore[arg-type]
        data = [measure_examples(vlm, examples, media_options, settings) for examples in datasets]
        valid = measure_examples(vlm, held_out, media_options, settings) if held_out else None
        self.example_count = sum(len(one.examples) for one in data)
        self.skipped_count = sum(one.skipped for one in (*data, valid) if one is not None)
        self.total_steps = self._count_steps()
        self._adapter = self._choose_parameters()
        features = None if trains_encoder(vlm.model) else EmbeddingCache(vlm)
        self._loader = self._make_loader(data, media_options, features)
        self._valid = self._make_valid(valid, media_options, features)
        self.loop = self._make_loop()

    def _choose_parameters(self) -> AdapterConfig | None:
        """Leave what is to be trained; the new adapter, if the method is by one."""
        settings, vlm = self.settings, self.vlm
        mx.random.seed(settings.seed)
        if settings.method == "lora":
            source = vlm.config.source
            return start_adapter(vlm.model, settings.trained_parts, settings.lora, source)
        freeze_other_parts(vlm.model, settings.trained_parts)
        return None

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        trained: Any = tree_flatten(self.vlm.model.trainable_parameters())
        return sum(int(array.size) for _, array in trained)

    @property
    def result(self) -> Path:
        """The folder of what is trained."""
        return self.out / (ADAPTER if self._adapter else MODEL)

    def run(self) -> Iterator[TuningEvent]:
        """Makes the steps that are left, evaluates, saves and logs as the settings say.

        What was trained is saved at the end; who stops before calls `save`.

        Raises:
            TrainingError: The loss is no number any more, or the disk refuses.
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
        """Mean loss of the tokens of the held-out answers."""
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
        """Write what was trained, then the state to go on from.

        Raises:
            TrainingError: The disk is full, or refuses for another reason.
            CheckpointError: Likewise, of a whole model.
        """
        model = self.vlm.model
        with report_write_errors(self.out):
            if self._adapter is not None:
                save_adapter(model, self.result, self._adapter)
            else:
                write_model(model, self.vlm.path, mark_as_tuned(self.vlm.config), self.result)
            self.loop.save(self.out / STATE_FILE, self._notes)

    def fuse(self) -> Path:
        """The checkpoint of base and adapter together.

        Raises:
            TrainingError: There is no adapter.
        """
        if self._adapter is None:
            raise TrainingError("method full has no adapter to fuse: its model is whole already")
        return fuse(self.vlm.path, self.result, self.out / FUSED)

    def close(self) -> None:
        """Let go of threads and of the folder."""
        for loader in self._loaders:
            loader.close()
        os.close(self._lock)

    def _compute_identity(self, datasets: Sequence[Sequence[Example]]) -> dict[str, str]:
        """What has to be the same for a training to go on."""
        total = hashlib.blake2b(digest_size=16)
        for examples in datasets:
            data = examples[0].file.read_bytes()
            total.update(b"%d\n" % len(data) + data)
            for path in [path for one in examples for path in (*one.images, *one.videos)]:
                total.update(b"%d\n" % path.stat().st_size)
        base = json.dumps([self.vlm.config.to_dict(), compute_signature(self.vlm.model)])
        return {
            "settings": json.dumps(self.settings.dump_decisive()),
            "data": total.hexdigest(),
            "base": hashlib.blake2b(base.encode(), digest_size=16).hexdigest(),
        }

    def _read_held_out(self) -> list[Example]:
        """The examples to evaluate on: those named, else the valid.jsonl beside the data."""
        settings = self.settings
        if settings.valid is not None:
            return read_dataset(settings.resolve_path(settings.valid), "valid")
        folders = [settings.resolve_path(one.path) for one in settings.data]
        found = [one for one in folders if (one / "valid.jsonl").is_file()]
        return [example for one in found for example in read_dataset(one, "valid")]

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
        features: EmbeddingCache | None,
    ) -> BatchLoader:
        settings, count = self.settings, self.total_steps * self.settings.accumulate
        weights = [one.weight for one in settings.data if one.weight is not None]
        lengths = [one.lengths for one in data]
        order = BatchOrder(lengths, weights or None, settings.batch_size, count, settings.seed)

        def items(number: int) -> list[Example]:
            return [data[d].examples[i] for d, i in order.get_batch(number)]

        self._loaders.append(BatchLoader(self.vlm, items, count, media_options, features))
        return self._loaders[-1]

    def _make_valid(
        self,
        data: TrainingData | None,
        media_options: MediaOptions,
        features: EmbeddingCache | None,
    ) -> tuple[BatchLoader, int] | None:
        """Batches of the held-out examples, alike in length, and their number."""
        if data is None:
            return None
        size = self.settings.batch_size
        order = sorted(range(len(data.examples)), key=lambda i: data.lengths[i])
        count = math.ceil(len(order) / size)

        def items(number: int) -> list[Example]:
            return [data.examples[i] for i in order[number * size : (number + 1) * size]]

        self._loaders.append(BatchLoader(self.vlm, items, count, media_options, features))
        return self._loaders[-1], count

    def _make_loop(self) -> Loop:
        settings, own = self.settings, self.settings.optimizer
        schedule = Schedule(own.rate, self.total_steps, own.warmup, own.schedule, own.floor)  # type: ignore[arg-type]
        options = LoopOptions(schedule, settings.accumulate, own.clip or None, settings.seed)
        loss = checkpointed_loss if settings.checkpoint_gradients else answer_loss
        adam = optim.AdamW(own.rate, weight_decay=own.weight_decay, bias_correction=True)
        return Loop(self.vlm.model, loss, adam, self._loader.load_batch, options)

    def _resume(self) -> None:
        """Go on from the folder's state, if it is of this training."""
        path = self.out / STATE_FILE
        if path.exists():
            check_same(path, read_notes(path), self._notes)
            self.loop.restore(path)
        rewind(self.out / LOG_FILE, self.loop.step)

    def _log(self, event: TuningEvent) -> TuningEvent:
        """`event`, written to the log."""
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
