"""The command as users and scripts run it: a process with stdin, stdout, stderr, a status."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import TextIO

import pytest
from PIL import Image

from tests.helpers.command import COMMAND, assert_one_error, environment, run

# The command with an answer that takes its time and never ends by itself.
SLOW = """
import itertools, time
import mlx_smolvlm.generate.stream
def tokens(*arguments):
    for i in itertools.count():
        time.sleep(0.02)
        yield 40 + i % 20
mlx_smolvlm.generate.stream.generate_tokens = tokens
mlx_smolvlm.generate.stream.generate_drafted_tokens = tokens
from mlx_smolvlm.cli.app import main
main()
"""


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (64, 48), (200, 30, 30)).save(path)
    return path


@pytest.fixture(scope="module")
def answer(tiny_folder: Path) -> str:
    """What the random model says to "Hello", from the library."""
    import mlx_smolvlm as smolvlm

    vlm = smolvlm.load(tiny_folder)
    return vlm.ask("Hello", sampling=smolvlm.Sampling(max_tokens=12)).text


def test_the_answer_is_all_of_stdout(tiny_folder: Path, answer: str) -> None:
    result = run("chat", "Hello", "-m", tiny_folder, "--max-tokens", "12")
    assert (result.returncode, result.stdout.decode(), result.stderr) == (0, answer + "\n", b"")


def test_stdin_is_the_prompt(tiny_folder: Path, answer: str) -> None:
    result = run("chat", "-m", tiny_folder, "--max-tokens", "12", stdin=b"Hello\n")
    assert (result.returncode, result.stdout.decode()) == (0, answer + "\n")


def test_picture_stats_and_json(tiny_folder: Path, picture: Path) -> None:
    arguments = ("chat", "What?", "-m", tiny_folder, "--max-tokens", "5", "--json", "--stats")
    result = run(*arguments, "-i", picture)
    reply = json.loads(result.stdout)
    assert result.stdout.count(b"\n") == 1
    assert reply["image_tiles"] == 5
    assert reply["generation_tokens"] == 5
    assert reply["finish_reason"] == "length"
    stats = result.stderr.decode()
    assert stats.count("\n") == 1
    assert f"prompt: {reply['prompt_tokens']} tokens (5 tiles)" in stats
    low = run(*arguments, "-i", "-", "--detail", "low", stdin=picture.read_bytes())
    assert json.loads(low.stdout)["image_tiles"] == 1


def test_system_and_stop_reach_the_model(tiny_folder: Path, answer: str) -> None:
    stop = answer[3:5]
    cut = run("chat", "Hello", "-m", tiny_folder, "--max-tokens", "12", "--stop", stop)
    assert cut.stdout.decode() == answer[: answer.index(stop)] + "\n"
    arguments = ("chat", "Hello", "-m", tiny_folder, "--max-tokens", "1", "--json")
    plain, system = run(*arguments), run(*arguments, "--system", "Be brief.")
    counts = [json.loads(result.stdout)["prompt_tokens"] for result in (plain, system)]
    assert counts[1] > counts[0]


SCHEMA = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}


@pytest.mark.parametrize("in_a_file", [True, False])
def test_schema(tiny_folder: Path, tmp_path: Path, in_a_file: bool) -> None:
    schema = json.dumps(SCHEMA)
    if in_a_file:
        (tmp_path / "schema.json").write_text("\ufeff" + schema)
        schema = str(tmp_path / "schema.json")
    arguments = ("chat", "Hello", "-m", tiny_folder, "--schema", schema)
    text = run(*arguments).stdout.decode()
    assert text in ('{"sure":true}\n', '{"sure":false}\n')
    reply = json.loads(run(*arguments, "--json").stdout)
    assert reply["parsed"] == json.loads(reply["text"]) == json.loads(text)
    assert reply["finish_reason"] == "stop"


def test_regex(tiny_folder: Path) -> None:
    arguments = ("chat", "Hello", "-m", tiny_folder, "--regex", "gr(ü|ee)n")
    assert run(*arguments).stdout.decode() in ("grün\n", "green\n")
    assert json.loads(run(*arguments, "--json").stdout)["parsed"] is None


LONG_SCHEMA = {"type": "array", "items": SCHEMA, "minItems": 5, "maxItems": 5}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--schema", json.dumps(LONG_SCHEMA), "--max-tokens", "12"), "at --max-tokens 12, before"),
        (("--schema", json.dumps(LONG_SCHEMA), "--stop", "}"), "--stop ended the answer before"),
        (("--regex", "(ab){40}", "--max-tokens", "7"), "--max-tokens 7, before it matched --regex"),
        (("--regex", "(ab){900}"), "the context was full before it matched --regex"),
    ],
)
def test_an_answer_that_is_cut_before_it_fits_is_an_error(
    tiny_folder: Path, options: tuple[str, ...], words: str
) -> None:
    arguments = ("chat", "Hello", "-m", tiny_folder, *options)
    result, as_json = run(*arguments), run(*arguments, "--json")
    assert result.returncode == as_json.returncode == 1
    error = result.stderr.decode()
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert as_json.stderr == result.stderr
    reply = json.loads(as_json.stdout)
    assert reply["text"] + "\n" == result.stdout.decode() != "\n"
    assert reply["parsed"] is None
    assert reply["finish_reason"] == ("stop" if "--stop" in options else "length")


def test_null_is_an_answer(tiny_folder: Path) -> None:
    result = run("chat", "Hello", "-m", tiny_folder, "--schema", '{"type": "null"}')
    assert (result.returncode, result.stdout, result.stderr) == (0, b"null\n", b"")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--schema", "nowhere.json", ("nowhere.json", "No such file")),
        ("--schema", "text.json", ("not JSON",)),
        ("--schema", "bytes.json", ("bytes.json", "utf-8")),
        ("--schema", ".", ("Is a directory",)),
        ("--schema", '{"type": "strng"}', ("Invalid type: strng",)),
        ("--regex", "(a", ("unclosed group",)),
    ],
)
def test_a_wrong_schema_or_expression(
    tmp_path: Path, option: str, value: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "text.json").write_text("a schema")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    result = subprocess.run(
        [*COMMAND, "chat", "Hello", option, value],
        capture_output=True,
        timeout=60,
        env=environment(),
        cwd=tmp_path,
    )
    assert_one_error(result, option, *words, status=2)


def test_without_llguidance() -> None:
    code = "import sys; sys.modules['llguidance'] = None; import mlx_smolvlm.cli.app as a; a.main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "chat", "Hello", "--regex", "a"],
        capture_output=True,
        timeout=60,
        env=environment(),
    )
    assert_one_error(result, "llguidance", "pip install 'mlx-smolvlm[json]'")


def test_a_second_run_goes_on_from_the_cache_folder(
    tiny_folder: Path, picture: Path, tmp_path: Path
) -> None:
    arguments = ("chat", "What?", "-m", tiny_folder, "--max-tokens", "5", "--json", "-i", picture)
    runs = [run(*arguments, "--cache-dir", tmp_path / "kept") for _ in range(2)]
    first, second = (json.loads(result.stdout) for result in runs)
    assert (first["encoded_tiles"], first["cached_tokens"]) == (5, 0)
    assert (second["encoded_tiles"], second["token_ids"]) == (0, first["token_ids"])
    assert second["cached_tokens"] == second["prompt_tokens"] - 1
    (tmp_path / "file").write_text("")
    assert_one_error(run(*arguments, "--cache-dir", tmp_path / "file"), "cache folder")


def bomb(width: int, height: int) -> bytes:
    """A valid PNG header of a large picture, without its pixels."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    chunks = ((b"IHDR", size + b"\x08\x02\0\0\0"), (b"IDAT", zlib.compress(bytes(64))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        for name, data in chunks
    )


@pytest.mark.parametrize("case", ["missing", "folder", "empty", "truncated", "text", "bomb"])
def test_unusable_picture(case: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    contents = {
        "empty": b"",
        "truncated": buffer.getvalue()[:1000],
        "text": b"not a picture\n" * 9,
        "bomb": bomb(20_000, 10_000),
    }
    words = {
        "missing": "does not exist",
        "folder": "folder",
        "empty": "empty",
        "truncated": "truncated",
        "text": "not a picture",
        "bomb": "too large",
    }
    if case == "folder":
        path.mkdir()
    elif case in contents:
        path.write_bytes(contents[case])
    # The model does not exist either: the picture is looked at first.
    assert_one_error(run("chat", "What?", "-i", path, "-m", tmp_path / "none"), words[case])


def test_unusable_model(tiny_folder: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(tiny_folder, tmp_path / name))

    no_weights = broken("no-weights")
    (no_weights / "model.safetensors").unlink()
    assert_one_error(run("chat", "Hi", "-m", no_weights), "model.safetensors")

    cut = broken("cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_one_error(run("chat", "Hi", "-m", cut), "cut off")

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    cache = {"MLX_SMOLVLM_CACHE": str(tmp_path / "cache")}
    assert_one_error(run("chat", "Hi", "-m", other, env=cache), "bert")


def test_models_that_are_not_here_offline(tmp_path: Path) -> None:
    cache = {"MLX_SMOLVLM_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    unknown = run("chat", "Hi", "-m", "no-such-alias", "--offline", env=cache)
    assert_one_error(unknown, "no-such-alias", "smolvlm-256m")
    known = run("chat", "Hi", "-m", "smolvlm-256m", "--offline", env=cache)
    assert_one_error(known, "HuggingFaceTB/SmolVLM-256M-Instruct", "offline")


def test_stdin_without_a_prompt(tiny_folder: Path, picture: Path) -> None:
    assert_one_error(run("chat", "-m", tiny_folder), "stdin is empty")
    assert_one_error(run("chat", "-m", tiny_folder, stdin=b" \n"), "stdin is empty")
    result = run("chat", "-m", tiny_folder, stdin=picture.read_bytes())
    assert_one_error(result, "but it is not utf-8 text", "-i -")
    result = run("chat", "-i", "-", stdin=picture.read_bytes())
    assert_one_error(result, "PROMPT", status=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Hi", "--max-tokens", "0"), ("--max-tokens", "1 or above")),
        (("Hi", "--temperature", "-0.5"), ("--temperature", "0 or above")),
        (("Hi", "--top-p", "1.5"), ("--top-p", "at most 1")),
        (("Hi", "--detail", "huge"), ("--detail", "huge")),
        (("Hi", "--on-full", "drop"), ("--on-full", "drop-oldest")),
        (("Hi", "--bits", "5"), ("--bits", "'4', '8', '16'")),
        (("Hi", "--kv-bits", "3"), ("--kv-bits", "4 or 8")),
        (("Hi", "--max-kv-tokens", "9"), ("--max-kv-tokens", "72 or above")),
        (("Hi", "--kv-bits", "8", "--cache-dir", "x"), ("--cache-dir", "--kv-bits")),
        (("Hi", "-i", "-", "-i", "-"), ("-i", "twice")),
        (("Hi", "-i", "https://example.org/a.png", "--offline"), ("--offline", "network")),
        (("",), ("PROMPT", "empty")),
        ((b"\xff",), ("PROMPT", "UTF-8")),
        (("Hi", "--film", "a.mp4"), ("No such option",)),
    ],
)
def test_wrong_option(arguments: tuple[str | bytes, ...], words: tuple[str, ...]) -> None:
    # The picture and the model do not exist: options are looked at first.
    result = run("chat", "-m", "/none", *arguments)
    assert_one_error(result, *words, status=2)


def test_any_encoding(tiny_folder: Path) -> None:
    arguments = ("chat", "Hé", "-m", tiny_folder, "--max-tokens", "60")
    rich = run(*arguments, "--json").stdout
    assert not rich.isascii()  # readable where it can be
    utf8 = json.loads(rich)
    poor = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    plain = run(*arguments, env=poor | {"PYTHONIOENCODING": "ascii:strict"})
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.isascii()
    assert b"?" in plain.stdout
    as_json = run(*arguments, "--json", env=poor | {"PYTHONIOENCODING": "ascii:strict"})
    assert json.loads(as_json.stdout)["text"] == utf8["text"]


def slow(*arguments: str | Path) -> "subprocess.Popen[bytes]":
    """The command with a slow, endless answer, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        start_new_session=True,
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_said(tiny_folder: Path, as_json: bool) -> None:
    extra = ("--json",) if as_json else ()
    process = slow("chat", "Hi", "-m", tiny_folder, "--max-tokens", "400", *extra)
    assert process.stdout is not None
    first = b""
    if as_json:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=4)
    else:
        first = process.stdout.read(3)  # it streams
    os.killpg(process.pid, signal.SIGINT)
    rest, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, b"")
    output = (first + rest).decode()
    if as_json:
        reply = json.loads(output)
        assert reply["finish_reason"] == "interrupted"
        assert 0 < reply["generation_tokens"] < 400
    else:
        assert output.endswith("\n")
        assert 3 < len(output) < 200


def test_closed_stdout_is_quiet(tiny_folder: Path) -> None:
    process = slow("chat", "Hi", "-m", tiny_folder)
    assert process.stdout is not None
    assert process.stderr is not None
    assert len(process.stdout.read(5)) == 5
    process.stdout.close()
    error = process.stderr.read()
    assert (process.wait(timeout=20), error) == (141, b"")
    process.stderr.close()


def broken_pipe() -> TextIO:
    """A stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize(
    ("stream", "arguments", "status"),
    [
        ("stdout", ["--help"], 141),
        ("stdout", ["chat", "--help"], 141),
        ("stdout", ["--version"], 141),
        ("stderr", ["--no-such-option"], 2),
        ("stderr", [], 2),
    ],
)
def test_output_that_typer_prints_and_nobody_reads(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    stream: str,
    arguments: list[str],
    status: int,
) -> None:
    from mlx_smolvlm.cli.command_table import run_command

    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # set back at the end
    monkeypatch.setattr(sys, "argv", ["mlx-smolvlm", *arguments])
    with broken_pipe() as pipe:  # closing it flushes, as the interpreter does at exit
        monkeypatch.setattr(sys, stream, pipe)
        assert run_command() == status
    assert capfd.readouterr() == ("", "")


INTERRUPTED_IMPORT = """
import os, signal, sys
class Interrupter:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
from mlx_smolvlm.cli.app import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "mlx.core"])
def test_ctrl_c_ends_the_imports_at_once(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT.format(module=module), "chat", "Hi"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        env=environment(),
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


def test_ctrl_c_stays_ignored_where_it_is() -> None:
    from mlx_smolvlm.cli.app import _exit_on_interrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.SIG_IGN, signal.default_int_handler):
            signal.signal(signal.SIGINT, handler)
            with _exit_on_interrupt():
                is_same = signal.getsignal(signal.SIGINT) is handler
                assert is_same == (handler is signal.SIG_IGN)
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tiny_folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [*COMMAND, "chat", "Hi", "-m", tiny_folder, "--max-tokens", "3"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            env=environment(),
        )
    assert (result.returncode, result.stderr) == (1, b"error: No space left on device\n")


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_stream_closed_from_the_start(tiny_folder: Path, stream: int) -> None:
    redirect = f"{'<' if stream == 0 else f'{stream}>'}&-"
    command = f'exec "$@" {redirect}'
    arguments = ["chat", "Hi", "-m", str(tiny_folder), "--max-tokens", "3"]
    result = subprocess.run(
        ["/bin/sh", "-c", command, "sh", *COMMAND, *arguments],
        capture_output=True,
        timeout=60,
        env=environment(),
    )
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("MemoryError()", "error: out of memory; try --detail low"),
        ("RuntimeError('[malloc] Unable to allocate 9 bytes')", "error: out of memory ([malloc]"),
        ("OSError(28, 'No space left', 'x.bin')", "error: No space left: x.bin\n"),
        ("RuntimeError('a bug')", "RuntimeError: a bug\n"),
    ],
)
def test_error_boundary(error: str, words: str) -> None:
    program = (
        "import mlx_smolvlm\n"
        f"def load(*arguments, **options): raise {error}\n"
        "mlx_smolvlm.load = load\n"
        "from mlx_smolvlm.cli.app import main\n"
        "main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "chat", "Hi"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert words in result.stderr
    is_bug = "bug" in error
    assert ("Traceback (most recent call last)" in result.stderr) == is_bug
    assert "\u2502" not in result.stderr  # no frame with local values
    assert is_bug or result.stderr.count("\n") == 1


def test_help_and_version() -> None:
    program = (
        "import sys; from mlx_smolvlm.cli.app import main\n"
        "try: main()\n"
        "finally: print(sorted({'rich', 'PIL', 'av', 'transformers', 'huggingface_hub',"
        " 'tokenizers', 'jinja2', 'numpy', 'mlx'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "chat", "--help"],
        capture_output=True,
        timeout=60,
        env=environment(),
    )
    assert result.returncode == 0
    assert result.stderr == b"[]\n"  # nothing slow is imported for a help text
    text = result.stdout.decode()
    assert "Examples:\n" in text
    for option in (
        *("--image", "--model", "--system", "--max-tokens", "--temperature", "--top-p"),
        *(
            "--seed",
            "--stop",
            "--detail",
            "--bits",
            "--kv-bits",
            "--max-kv-tokens",
            "--offline",
            "--json",
            "--stats",
        ),
    ):
        assert option in text

    import mlx_smolvlm

    assert run("--version").stdout.decode() == f"mlx-smolvlm {mlx_smolvlm.__version__}\n"
