"""`mlx-smolvlm choose` as users and scripts run it."""

import json
import subprocess
from pathlib import Path

import pytest

from mlx_smolvlm import SmolVLM
from tests.helpers import command

EXAMPLE = Path(__file__).parents[2] / "examples" / "three.png"
CHOICES = ("red", "green sky", "blue")


def run(*arguments: str | bytes | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The finished command."""
    return command.run("choose", *arguments, stdin=stdin)


def flags(choices: tuple[str, ...]) -> list[str]:
    return [word for choice in choices for word in ("-c", choice)]


@pytest.mark.parametrize("normalize", ["none", "tokens"])
def test_json_is_what_the_library_says(tiny: SmolVLM, tiny_folder: Path, normalize: str) -> None:
    arguments = ("Which?", "-m", tiny_folder, "-i", EXAMPLE, "--system", "Brief.", "--json")
    result = run(*arguments, *flags(CHOICES), "--normalize", normalize)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.count(b"\n") == 1
    told = json.loads(result.stdout)
    assert told.pop("normalize") == normalize
    choice = tiny.choose(
        "Which?",
        CHOICES,
        images=[EXAMPLE],
        system="Brief.",
        normalize=normalize,  # type: ignore[arg-type]
    )
    assert told["choices"] == list(CHOICES)
    assert told["best"] == choice.best
    assert told["probabilities"] == pytest.approx(choice.probabilities, abs=1e-5)
    assert told["logprobs"] == pytest.approx(choice.logprobs, abs=1e-4)


def test_a_table_with_the_best_first() -> None:
    result = run("What color is the square?", "-i", "-", *flags(("Red.", "Green.")),
                 stdin=EXAMPLE.read_bytes())  # fmt: skip
    assert (result.returncode, result.stderr.count(b"\n")) == (0, 1)  # what the demo knows
    first, best, second, other = result.stdout.decode().split()
    assert (best, other) == ("Green.", "Red.")
    assert float(first) > float(second)
    assert float(first) + float(second) == pytest.approx(1, abs=1e-3)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no picture")
    result = run("What?", *flags(CHOICES), "-i", tmp_path / "text", "-m", "/none")
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.startswith(b"error: ")
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("What?",), ("--choice", "Missing")),
        (("What?", "-c", "a"), ("--choice", "the number of choices is 1")),
        (("What?", "-c", "a", "-c", "a"), ("--choice", "both 'a'")),
        (("What?", "-c", "a", "-c", " "), ("--choice", "choice 2 is empty")),
        (("What?", "-c", "a", "-c", b"\xff"), ("--choice", "UTF-8")),
        ((" ", "-c", "a", "-c", "b"), ("QUESTION", "empty")),
        (("What?", "-c", "a", "-c", "b", "--normalize", "c"), ("--normalize", "'none', 'tokens'")),
        (("What?", "-c", "a", "-c", "b", "--bits", "5"), ("--bits", "'4', '8', '16'")),
        (("What?", "-c", "a", "-c", "b", "--detail", "x"), ("--detail", "'x'")),
        (("What?", "-c", "a", "-c", "b", "-i", "-", "-v", "-"), ("-i, -v", "twice")),
        (
            ("What?", "-c", "a", "-c", "b", "-i", "http://a.org/a.png", "--offline"),
            ("--offline", "network"),
        ),
    ],
)
def test_wrong_option(arguments: tuple[str | bytes, ...], words: tuple[str, ...]) -> None:
    # The model does not exist: options are looked at first.
    result = run("-m", "/none", *arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    for word in words:
        assert word in result.stderr.decode()
