"""The conversation, and what else a terminal changes, on a pseudo-terminal."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.dumb_terminal import Terminal

# Each answer is what the model has seen of the user's messages, and as long as asked for.
FAKE = r"""
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this process
import mlx_smolvlm.generate.stream
from mlx_smolvlm.generate.engine import Engine
def tokens(model, inputs_embeds, cache, sampler, limit):
    for i in range(limit):
        if limit > 50:
            time.sleep(0.02)
        yield TOKENS[i % len(TOKENS)]
mlx_smolvlm.generate.stream.generate_tokens = tokens
mlx_smolvlm.generate.stream.generate_drafted_tokens = tokens
old = Engine.make_prompt
def make_prompt(self, messages, *rest):
    users = [m for m in messages if m["role"] == "user"]
    said = [len(m["content"][0]["text"]) > 0 for m in messages if m["role"] == "assistant"]
    items = [item["type"] for item in users[-1]["content"]]
    print(f"<seen {len(users)} users, {len(said)} answers, {items.count('image')} images>")
    return old(self, messages, *rest)
Engine.make_prompt = make_prompt
TOKENS = [int(n) for n in sys.argv.pop(1).split(",")]
from mlx_smolvlm.cli.app import main
main()
"""


Start = Callable[..., Terminal]


@pytest.fixture
def start(tiny_folder: Path) -> Iterator[Start]:
    started: list[Terminal] = []

    def begin(
        *arguments: str | Path, tokens: str = "40,41,42", stdout: Path | None = None
    ) -> Terminal:
        model = ("-m", str(tiny_folder))
        words = ("-c", FAKE, tokens, "chat", *map(str, arguments), *model)
        started.append(Terminal(*words, stdout=stdout))
        return started[-1]

    yield begin
    for terminal in started:
        terminal.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "my photo's.png"
    Image.new("RGB", (64, 48), (200, 30, 30)).save(path)
    return path


def test_conversation(start: Start, picture: Path) -> None:
    terminal = start("--max-tokens", "6", "-i", picture)
    terminal.expect("photo's.png: 2 x 2 tiles \\+ 1, \\d+ tokens")
    terminal.expect("> ")
    terminal.send("First\n")
    terminal.expect("<seen 1 users, 0 answers, 1 images>\r\n(\r\x1b[^\r]*)*[^\r]+\r\n> ")
    terminal.send("\n")
    terminal.expect("> ")
    terminal.send(f"/image {picture}\n")
    terminal.expect("2 x 2 tiles[^>]*> ")
    terminal.send("Second\n")
    terminal.expect("<seen 2 users, 1 answers, 1 images>\r\n[^>]*> ")
    terminal.send("Third\n")
    terminal.expect("<seen 3 users, 2 answers, 0 images>\r\n[^>]*> ")
    terminal.send("/reset\n")
    terminal.expect("> ")
    terminal.send("Fourth\n")
    terminal.expect("<seen 1 users, 0 answers, 0 images>\r\n[^>]*> ")
    terminal.send("\x04")
    assert terminal.status() == 0
    assert "Traceback" not in terminal.text


def test_mistakes_do_not_end_it(start: Start, tmp_path: Path) -> None:
    terminal = start("--max-tokens", "6")
    terminal.expect("> ")
    terminal.send(f"/image {tmp_path / 'none.png'}\n")
    terminal.expect("error: .*does not exist[^>]*> ")
    terminal.send("/image\n")
    terminal.expect("error: /image needs a path\r\n> ")
    terminal.send("/imgae x\n")
    terminal.expect("error: there is no command /imgae; did you mean /image[^>]*> ")
    terminal.send("/help\n")
    terminal.expect("/image PATH(.|\n)*/reset(.|\n)*/exit(.|\n)*> ")
    terminal.send("wool " * 600 + "\n")
    terminal.expect("error: the prompt takes [^>]*> ")
    terminal.send("Short\n")
    terminal.expect("<seen 1 users, 0 answers, 0 images>\r\n[^>]*> ")
    terminal.send("/exit\n")
    assert terminal.status() == 0


def test_ctrl_c_stops_the_answer_only(start: Start) -> None:
    terminal = start("--max-tokens", "900")
    terminal.expect("> ")
    terminal.send("First\n")
    terminal.expect("<seen 1 users, 0 answers, 0 images>\r\n.{5}")
    terminal.send("\x03")
    terminal.expect("\r\n> ")
    terminal.send("Second\n")
    terminal.expect("<seen 2 users, 1 answers, 0 images>\r\n.{5}")
    terminal.send("\x03")
    terminal.expect("\r\n> ")
    terminal.send("half a li")
    terminal.expect("half a li")
    terminal.interrupt()
    terminal.expect("\r\n> ")
    terminal.interrupt()
    terminal.expect("Ctrl-C again or Ctrl-D leaves[^>]*> ")
    terminal.send("/help\n")
    terminal.expect("stops an answer(.|\n)*> ")
    terminal.interrupt()
    terminal.expect("Ctrl-C again or Ctrl-D leaves[^>]*> ")
    terminal.interrupt()
    assert terminal.status() == 130
    assert "Traceback" not in terminal.text


def token_id(folder: Path, text: str) -> int:
    """Id of the byte token for `text`."""
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert len(ids) == 1
    return ids[0]


def test_controls_are_spelled_out_on_a_terminal(start: Start, tiny_folder: Path) -> None:
    texts = ("A", "\x1b", "\r", "\x07", "\t", "B")
    tokens = ",".join(str(token_id(tiny_folder, text)) for text in texts)
    terminal = start("Hi", "--max-tokens", "6", tokens=tokens)
    shown = terminal.expect("B\r\n")
    assert r"A\x1b\x0d\x07" in shown
    assert "\x1b" not in shown
    assert terminal.status() == 0


def test_answers_go_to_a_file_and_prompts_to_the_terminal(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "answers.txt"
    terminal = start("--max-tokens", "6", "--json", stdout=path)
    terminal.expect("> ")
    terminal.send("First\n")
    terminal.expect("> ")
    terminal.send("\x04")
    assert terminal.status() == 0
    lines = path.read_text().splitlines()
    assert [line[:1] for line in lines] == ["<", "{"]


def test_split_sources(picture: Path) -> None:
    from mlx_smolvlm.cli.terminal.paths import split_sources

    spaced = picture.with_name("a b.png")
    picture.rename(spaced)
    assert split_sources(str(spaced)) == [str(spaced)]  # as it stands
    assert split_sources(r"a\ b.png 'c d.png'") == ["a b.png", "c d.png"]  # as dropped
    assert split_sources("it's.png") == ["it's.png"]
    assert split_sources("https://example.org/a b.png") == ["https://example.org/a b.png"]
    assert split_sources("") == []


def test_one_shot_says_what_the_picture_costs(start: Start, picture: Path) -> None:
    terminal = start("Hi", "-i", picture, "--max-tokens", "3", "--detail", "low")
    terminal.expect("my photo's.png: 1 tile, \\d+ tokens")
    assert terminal.status() == 0
