"""What is typed arrives: each option's value in the function that does the work."""

import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import typer

from mlx_smolvlm import CacheOptions, Sampling, SmolVLM, Video
from mlx_smolvlm.checkpoint.load import read_config
from mlx_smolvlm.cli import chat, choose, convert, evaluate
from mlx_smolvlm.cli.app import main
from mlx_smolvlm.cli.args import ChatOptions
from mlx_smolvlm.cli.choose import ChooseOptions
from mlx_smolvlm.cli.evaluate import EvaluateRequest
from mlx_smolvlm.cli.media import VideoOptions
from mlx_smolvlm.config import DTYPES
from mlx_smolvlm.convert.options import FLOAT_MODES
from mlx_smolvlm.generate.choose import Normalize
from mlx_smolvlm.train.evaluate.cases import EvaluationOptions
from mlx_smolvlm.train.evaluate.metrics import Metric


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["mlx-smolvlm", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, int | None)
    return end.value.code or 0


def chat_options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ChatOptions:
    """What `chat` is asked for; its status is that of the command."""
    seen: list[ChatOptions] = []

    def read_question(options: ChatOptions) -> None:
        seen.append(options)
        raise typer.Exit(7)

    monkeypatch.setattr("mlx_smolvlm.cli.chat.read_question", read_question)
    assert run(monkeypatch, "chat", *arguments) == 7
    return seen[0]


def test_every_option_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    options = chat_options(
        monkeypatch,
        *("What?", "-i", "a.png", "-i", "b.png", "-v", "c.mp4", "-m", "model", "--system", "Be."),
        *("--max-tokens", "9", "--temperature", "0.5", "--top-p", "0.25", "--seed", "3"),
        *("--stop", "x", "--stop", "y", "--regex", "a+", "--detail", "low", "--bits", "8"),
        *("--fps", "2", "--max-frames", "5", "--start", "1:02", "--end", "1:10"),
        *("--sample", "scene", "--frames", "seen", "--adapter", "lora", "--kv-bits", "4"),
        *("--max-kv-tokens", "300", "--on-full", "drop-oldest", "--offline", "--json"),
        *("--stats", "--plain", "--no-images", "--memory-limit", "600MB"),
        *("--draft", "3"),
    )
    assert options == ChatOptions(
        prompt="What?",
        images=("a.png", "b.png"),
        videos=("c.mp4",),
        frames=VideoOptions(2.0, 5, 62.0, 70.0, "scene", None, Path("seen")),
        model="model",
        system="Be.",
        sampling=Sampling(
            temperature=0.5,
            top_p=0.25,
            max_tokens=9,
            seed=3,
            stop=("x", "y"),
            regex="a+",
            draft=3,
        ),
        detail="low",
        bits=8,
        adapter=Path("lora"),
        cache=CacheOptions(kv_bits=4, max_kv_tokens=300),
        memory_limit=600 * 10**6,
        on_full="drop-oldest",
        offline=True,
        json=True,
        stats=True,
        plain=True,
        pictures=False,
    )


def test_options_that_do_not_go_with_others_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    options = chat_options(monkeypatch, "Hi", "--schema", '{"type": "null"}', "--cache-dir", "kept")
    assert options.sampling == Sampling(schema='{"type": "null"}')
    assert options.cache == CacheOptions(folder=Path("kept"))
    assert chat_options(monkeypatch, "Hi", "-v", "a.mp4", "--chunk", "6.5").frames.chunk_s == 6.5


def test_every_option_of_choose_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ChooseOptions] = []
    monkeypatch.setattr("mlx_smolvlm.cli.choose.print_choices", seen.append)
    arguments = (
        *("What?", "-c", "A.", "-c", "B.", "-i", "a.png", "-v", "b.mp4", "-m", "model"),
        *("--system", "Be.", "--normalize", "tokens", "--detail", "2", "--bits", "4"),
        *("--adapter", "lora", "--cache-dir", "kept", "--offline", "--json"),
        *("--memory-limit", "2GB"),
    )
    assert run(monkeypatch, "choose", *arguments) == 0
    assert seen == [
        ChooseOptions(
            question="What?",
            choices=("A.", "B."),
            images=("a.png",),
            videos=("b.mp4",),
            model="model",
            system="Be.",
            detail=2,
            normalize="tokens",
            bits=4,
            adapter=Path("lora"),
            cache=CacheOptions(folder=Path("kept")),
            memory_limit=2 * 10**9,
            offline=True,
            json=True,
        )
    ]


def test_every_option_of_eval_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EvaluateRequest] = []

    def print_evaluation(request: EvaluateRequest) -> int:
        seen.append(request)
        return 0

    monkeypatch.setattr("mlx_smolvlm.cli.evaluate.print_evaluation", print_evaluation)
    arguments = (
        *("model", "a.jsonl", "b.jsonl", "--metric", "anls", "--tasks", "x,y", "--limit", "5"),
        *("--max-tokens", "9", "--detail", "low", "--results", "r.jsonl", "--restart"),
        *("--skip-bad", "--show-errors", "2", "--adapter", "lora", "--bits", "4"),
        *("--offline", "--markdown", "--memory-limit", "1.5 gb"),
    )
    assert run(monkeypatch, "eval", *arguments) == 0
    assert seen == [
        EvaluateRequest(
            model="model",
            data=("a.jsonl", "b.jsonl"),
            options=EvaluationOptions(
                metric="anls",
                tasks=("x", "y"),
                limit=5,
                max_tokens=9,
                detail="low",
                skip_bad=True,
            ),
            adapter=Path("lora"),
            bits=4,
            cache=CacheOptions(),
            memory_limit=15 * 10**8,
            offline=True,
            results=Path("r.jsonl"),
            restart=True,
            show_errors=2,
            json=False,
            markdown=True,
        )
    ]


def list_choices(function: Callable[..., Any], name: str) -> set[Any]:
    """The values that the parameter `name` of `function` may have."""
    hint = eval(function.__annotations__[name], vars(sys.modules[function.__module__]))
    while typing.get_origin(hint) is not Literal:  # within Annotated, and before "| None"
        hint = typing.get_args(hint)[0]
    return set(typing.get_args(hint))


def test_the_choices_are_those_of_the_library() -> None:
    """They stand in the signatures a second time, since the library is imported lazily."""
    assert list_choices(chat.chat, "sample") == list_choices(Video, "sample")
    assert list_choices(chat.chat, "on_full") == list_choices(SmolVLM.chat, "on_full")
    assert list_choices(choose.choose, "normalize") == set(typing.get_args(Normalize))
    assert list_choices(evaluate.evaluate, "metric") == set(typing.get_args(Metric))
    assert list_choices(convert.convert, "mode") == {"affine", *FLOAT_MODES}
    assert list_choices(convert.convert, "dtype") == set(DTYPES)


def test_convert_replaces_a_checkpoint_by_force_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tiny_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    dest = tmp_path / "out"
    convert = ("convert", str(tiny_folder), str(dest))
    assert run(monkeypatch, *convert) == 0
    before = (dest / "model.safetensors").stat().st_ino
    assert run(monkeypatch, *convert) == 1
    assert "use --force to replace it" in capsys.readouterr().err
    assert (dest / "model.safetensors").stat().st_ino == before
    assert run(monkeypatch, *convert, "--force", "--dtype", "float16") == 0
    assert read_config(dest).dtype == "float16"


def test_the_model_is_loaded_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, dict[str, Any]]] = []

    class LoadedError(Exception):
        pass

    def load(model: str, **options: Any) -> None:
        seen.append((model, options))
        raise LoadedError

    monkeypatch.setattr("mlx_smolvlm.load", load)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *("mlx-smolvlm", "chat", "Hi", "-m", "model", "--bits", "8", "--adapter", "lora"),
            *("--max-kv-tokens", "300", "--offline", "--memory-limit", "700kb"),
        ],
    )
    with pytest.raises(LoadedError):
        main()
    ((model, options),) = seen
    del options["progress"]
    assert model == "model"
    assert options == {
        "bits": 8,
        "offline": True,
        "cache": CacheOptions(max_kv_tokens=300),
        "adapter": Path("lora"),
        "memory_limit": 700 * 10**3,
    }


def test_a_conversation_refuses_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def read_question(options: ChatOptions) -> None:
        raise typer.Exit(0)

    monkeypatch.setattr("mlx_smolvlm.cli.chat.read_question", read_question)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert run(monkeypatch, "chat", "-v", "a.mp4", "--chunk", "60") == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--chunk" in said
    assert "it needs a question" in said
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert run(monkeypatch, "chat", "-v", "a.mp4", "--chunk", "60") == 0  # the question is piped


@pytest.mark.parametrize(
    "options",
    [("--bits", "4"), ("--recipe", "tiny"), ("--verify",), ("--gptq",), ("--dtype", "bfloat16")],
    ids=str,
)
def test_an_upload_as_it_is_refuses_options_that_change_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
) -> None:
    published: list[Path] = []
    monkeypatch.setattr("mlx_smolvlm.convert.upload.check_upload", lambda repo: "me")
    monkeypatch.setattr(
        "mlx_smolvlm.cli.convert.publish", lambda folder, request: published.append(folder)
    )
    assert run(monkeypatch, "convert", "demo", *options, "--upload", "me/x") == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "DEST" in said
    assert published == []
    assert run(monkeypatch, "convert", "demo", "--upload", "me/x") == 0
    assert len(published) == 1


@pytest.mark.parametrize("size", ["9" * 400 + "MB", "99999999999999GB", "9223372036.854775808GB"])
@pytest.mark.parametrize(
    "command", [("chat", "Hi", "--memory-limit"), ("convert", "demo", "--target-size")]
)
def test_sizes_that_no_machine_has_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: tuple[str, ...],
    size: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # where a conversion that is not refused would lie
    assert run(monkeypatch, *command, size) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"{command[-1]}: it must be below 9223372036 GB" in said


@pytest.mark.parametrize(
    ("arguments", "fixed"),
    [
        (("choose", "Hi", "-c", "A", "-c", "B"), {"bits", "kv_bits", "max_frames"}),
        (("eval", "demo", "data.jsonl"), {"bits", "kv_bits", "max_frames"}),
        (("chat", "Hi"), {"bits"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_advice_about_memory_names_only_options_of_the_command(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], fixed: set[str]
) -> None:
    guard = SimpleNamespace(fixed=frozenset({"bits"}))

    def stop(*_: Any, **__: Any) -> None:
        raise typer.Exit(7)

    vlm = SimpleNamespace(engine=SimpleNamespace(guard=guard), choose=stop)
    vlm.config = SimpleNamespace(is_demo=False)
    monkeypatch.setattr("mlx_smolvlm.load", lambda *_, **__: vlm)
    monkeypatch.setattr("mlx_smolvlm.train.evaluate.run.read_cases", lambda *_: None)
    monkeypatch.setattr("mlx_smolvlm.train.evaluate.run.Evaluation", stop)
    monkeypatch.setattr("mlx_smolvlm.cli.chat.Printer", stop)
    assert run(monkeypatch, *arguments) == 7
    assert guard.fixed == fixed
