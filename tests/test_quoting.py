"""What messages quote: no secrets, no control characters, and not too much of it."""

import json
import pickle
import re
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_smolvlm import errors, load
from mlx_smolvlm.cli import app, output
from mlx_smolvlm.cli.media import _shorten_source
from mlx_smolvlm.errors import (
    MAX_MESSAGE,
    CheckpointError,
    DatasetError,
    MediaError,
    SmolVLMWarning,
    escape_controls,
    format_message,
    redact,
    redact_url,
)
from mlx_smolvlm.media.fetch import describe_source, open_bytes

HOSTILE = "\x1b]52;c;aGk=\x07\x9b31m\x7f\u202eabc\u2066\u200f\u061c\r"
ESCAPED = r"\x1b]52;c;aGk=\x07\x9b31m\x7f\u202eabc\u2066\u200f\u061c\x0d"
TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process; gives the status and what is on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlx-smolvlm", *arguments])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as ended:
            app.main()
        captured = capsys.readouterr()
        assert not captured.out
        return ended.value.code, captured.err

    return run


# Control characters


def test_every_control_character_is_an_escape():
    controls = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F]
    controls += [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDC9B, 0xDFFF]
    text = "".join(map(chr, controls))
    assert escape_controls(text) == "".join(
        chr(code) if chr(code) in "\t\n" else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
        for code in controls
    )
    other = "a\u00e9\u0628 \u05d0\u00a0\u2014\u200d\U0001f600\n\t"
    assert escape_controls(other) == other


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "hi", "--schema", f"/nowhere/{HOSTILE}"),
        ("chat", "hi", "--detail", HOSTILE),
        ("chat", "hi", "--on-full", HOSTILE),
        ("chat", "hi", "--start", HOSTILE),
        ("chat", "hi", "--max-tokens", HOSTILE),
        ("chat", "hi", f"--{HOSTILE}"),
        ("chat", "hi", f"'{HOSTILE}x.png'"),
        ("chat", "hi", "--offline", "-i", f"http://host/{HOSTILE}"),
        ("chat", "hi", "-m", HOSTILE),
        ("chat", "hi", "-i", f"/nowhere/{HOSTILE}"),
        ("chat", "hi", "-i", f"ftp://host/{HOSTILE}"),
        (HOSTILE,),
        ("models", HOSTILE),
        ("models", "rm", "--yes", HOSTILE),
        ("eval", "demo", HOSTILE),
        ("convert", HOSTILE, "x"),
    ],
)
def test_no_control_character_of_an_argument_reaches_stderr(command, arguments):
    status, error = command(*arguments)
    assert status in (1, 2), error
    assert escape_controls(error) == error
    if "--max-tokens" not in arguments:  # the value of which is not repeated
        assert r"\x1b]52;c;aGk" in error


def test_usage_errors_keep_their_form(command):
    status, shown = command("chat", "--nope")
    assert status == 2
    assert shown.startswith(
        "Usage: mlx-smolvlm chat [OPTIONS] [PROMPT]...\nTry 'mlx-smolvlm chat -h' for help.\n\n"
        "Error: No such option: --nope"
    )
    status, shown = command()
    assert status == 2
    assert "Commands:\n  chat" in shown


@pytest.mark.parametrize("is_terminal", [False, True])
def test_all_that_is_said_is_escaped(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(output, "_count_columns", lambda: 200)
    output.say(HOSTILE)
    output.warn(HOSTILE)
    output.fail(f"{HOSTILE}\nerror: forged")
    assert capsys.readouterr().err == (
        f"{ESCAPED}\nwarning: {ESCAPED}\nerror: {ESCAPED} error: forged\n"
    )
    bar = output.ProgressBar()
    bar.draw(1, 2, HOSTILE)
    assert capsys.readouterr().err == (
        f"\r\x1b[K[{'#' * 12}{'.' * 12}] {ESCAPED}" if is_terminal else ""
    )


@pytest.mark.parametrize("is_terminal", [False, True])
def test_an_answer_is_escaped_on_a_terminal_alone(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    output.write(HOSTILE + "\n\t")
    assert capsys.readouterr().out == (ESCAPED if is_terminal else HOSTILE) + "\n\t"
    output.write_json({"text": HOSTILE})
    line = capsys.readouterr().out
    assert json.loads(line) == {"text": HOSTILE}
    assert (escape_controls(line) == line) is is_terminal


# Secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:topsecret@host/x", "http://host/x"),
        ("http://user:p@topsecret@host/x", "http://host/x"),
        ("http://topsecret@host:80", "http://host:80"),
        ("HTTPS://user:topsecret@HOST/x?k=topsecret#topsecret", "HTTPS://HOST/x"),
        ("http://user:topsecret@[::1]:80/x", "http://[::1]:80/x"),
        ("http://[::1]/x?topsecret", "http://[::1]/x"),
        ("http://user:topsecret", "http://user"),
        ("http://user:top/secret@host/x", "http://host/x"),
        ("http://user:top?secret@host/x", "http://host/x"),
        ("http://user:top#secret@host:8/x", "http://host:8/x"),
        ("http://user:top secret@host/x", "http://host/x"),
        ("ftp://user:topsecret@host/x", "ftp://host/x"),
        ("http:/user:topsecret@host/x", "http:/host/x"),
        ("http:\\\\user:topsecret@host\\x", "http:\\\\host\\x"),
        ("http://host/@user/x@2.png", "http://host/@user/x@2.png"),
        ("http://host:8080/a:b/c.png", "http://host:8080/a:b/c.png"),
        ("a/path@2x.png", "a/path@2x.png"),
        ("C:\\user@host", "C:\\user@host"),
        ("http://host/http://user:topsecret@host2/x", "http://host/"),
    ],
)
def test_a_url_without_its_secrets(url, shown):
    assert redact_url(url) == shown
    assert redact(f"'{url}' and \"{url}\"") == f"'{shown}' and \"{shown}\""
    assert describe_source(url) == repr(shown)
    assert _shorten_source(url) == shown.rstrip("/").rpartition("/")[2]
    if " " not in url:
        assert redact(f"see {url}, or ({url}).") == f"see {shown}, or ({shown})."


@pytest.mark.parametrize("kind", sorted(
    name
    for name, one in vars(errors).items()
    if isinstance(one, type) and issubclass(one, Exception)
))  # fmt: skip
def test_no_error_or_warning_of_ours_holds_a_secret(kind):
    made = getattr(errors, kind)(f"'http://u:topsecret@host/x?k=v': {TOKEN}\n {HOSTILE}" * 2)
    line = f"'http://host/x': hf_... {ESCAPED}"
    assert str(made) == line * 2
    assert made.args == (line * 2,)
    assert str(pickle.loads(pickle.dumps(made))) == line * 2
    assert str(getattr(errors, kind)()) == ""


def test_secrets_reach_no_error_of_the_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    url = "http://user:p@topsecret@host/x?key=topsecret"
    for source in (url, url.replace("http", "ftp"), " " + url, url.replace("//", "/")):
        with pytest.raises(MediaError) as caught:
            open_bytes(source)
        assert "secret" not in str(caught.value)
    for name in (url, f"owner/{TOKEN}", TOKEN):
        with pytest.raises(CheckpointError) as failed:
            load(name)
        assert "topsecret" not in str(failed.value)
        assert TOKEN not in str(failed.value)
    from mlx_smolvlm.train.dataset import read_dataset

    line = json.dumps({"image": url, "question": "a", "answer": "b"})
    (tmp_path / "data.jsonl").write_text(line)
    with pytest.raises(DatasetError, match="there is no file") as told:
        read_dataset(tmp_path / "data.jsonl")
    assert "topsecret" not in str(told.value)


def test_secrets_reach_no_error_of_the_hub(monkeypatch):
    from mlx_smolvlm.convert import source

    def fail(*_, **__):
        raise RuntimeError(f"401 for https://u:topsecret@hub/api?token={TOKEN} ({TOKEN})")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        source.download("owner/name")
    assert str(caught.value) == "owner/name: the download failed: 401 for https://hub/api (hf_...)"


def test_secrets_reach_no_error_of_the_command_line(command):
    url = "http://user:p@topsecret@host/x?key=topsecret"
    for arguments in (
        ("chat", "hi", "--offline", "-i", url),
        ("choose", "hi", "-c", "a", "-c", "b", "--offline", "-v", url),
        ("chat", "hi", "--schema", url),
        ("chat", "hi", "--detail", url),
        ("chat", "hi", "-i", url),
        ("chat", "hi", "-m", url),
        ("chat", "hi", f"{url}.png"),
        ("chat", "hi", "-m", TOKEN),
        ("chat", "hi", f"{TOKEN}.png"),
        ("models", "rm", "--yes", url),
        ("convert", url, "x", "--offline"),
        ("eval", url),
    ):
        status, error = command(*arguments)
        assert status in (1, 2), arguments
        assert "secret" not in error, arguments
        assert TOKEN not in error, arguments


def test_the_environment_is_told_without_its_secrets(monkeypatch):
    from mlx_smolvlm.cli.doctor_checks import check_environment

    monkeypatch.setenv("HF_ENDPOINT", "https://user:topsecret@mirror/")
    told = {finding.name: finding.text for finding in check_environment()}
    assert "HF_ENDPOINT=https://mirror/" in told["environment"]


# Length


def test_the_middle_of_a_long_message_is_left_out(command):
    for message in ("x" * 100_000, "\x1b" * 100_000, "http://u:secret@h/ " * 10_000):
        line = format_message(f"begin {message} end")
        assert len(line) <= MAX_MESSAGE
        assert line.startswith("begin ")
        assert line.endswith(" end")
        assert " ... " in line
        assert "secret" not in line
        assert format_message(line) == line
    for arguments in (
        ("chat", "hi", "--schema", "x" * 100_000),
        ("chat", "hi", "x" * 100_000),
        ("chat", "hi", "--detail", "x" * 100_000),
    ):
        status, error = command(*arguments)
        assert status in (1, 2)
        assert len(error) < MAX_MESSAGE + 200
    assert len(str(MediaError("x" * 100_000))) <= MAX_MESSAGE
    with pytest.warns(SmolVLMWarning) as seen:
        warnings.warn("x" * 100_000, SmolVLMWarning, stacklevel=1)
    assert len(str(seen[0].message)) <= MAX_MESSAGE


@given(st.text(alphabet="htp:/\\@?#'\" au1[]\x1b\u202e\n", max_size=60))
def test_a_message_is_not_changed_a_second_time(text):
    line = format_message(text)
    assert format_message(line) == line
    assert "\n" not in line


# The interactive program


def test_an_answer_in_the_interactive_program_is_escaped(monkeypatch):
    """In text, code, tables and a fence's language alike, and as an HTML entity."""
    from mlx_smolvlm import Reply
    from mlx_smolvlm.cli.terminal import live
    from mlx_smolvlm.cli.terminal.markdown import Renderer

    written = []
    monkeypatch.setattr(live, "write_raw", written.append)
    monkeypatch.setattr(live, "columns_and_rows", lambda: (200, 50))
    monkeypatch.setattr(live, "hide_typing", live.contextlib.nullcontext)
    screen = live.LiveScreen(Renderer())
    screen.begin("", Reply())
    code = f"```a{HOSTILE}\n{HOSTILE}\n```\n\n"
    answer = f"{HOSTILE}\n\n{code}|a|\n|-|\n|{HOSTILE}|\n\n&#x1b;[31m &#27; &#8238;\n"
    screen.add(answer)
    screen.finish(answer)
    screen.close()
    text = "".join(written)
    ours = r"\x1b\[[0-9;?]*[A-Za-z]|\r"  # colours, and the cursor's way
    assert escape_controls(re.sub(ours, "", text)) == re.sub(ours, "", text)
    assert text.count(r"\x1b]52;c;aGk=\x07") >= 4
    assert r"\u202eabc\u2066" in text


def test_names_in_the_interactive_program_are_escaped(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from mlx_smolvlm.cli.terminal.editor import InputCompleter
    from mlx_smolvlm.cli.terminal.talk import Talk

    monkeypatch.chdir(tmp_path)
    name = HOSTILE.replace("/", "") + ".png"
    (tmp_path / name).touch()
    event = CompleteEvent(completion_requested=True)
    (found,) = InputCompleter().get_completions(Document("/image "), event)
    assert found.display_text == ESCAPED + ".png"
    assert name.encode()[:1] in found.text.encode()  # what is typed is the name itself
    conversation = SimpleNamespace(context_used=1, context_size=2)
    options = SimpleNamespace(model=HOSTILE, pictures=False, system=None)
    options.sampling = options.detail = options.on_full = None
    talk = Talk(SimpleNamespace(chat=lambda **_: conversation), options, None)
    assert talk.format_status() == f"{ESCAPED} | 1 of 2 tokens"
