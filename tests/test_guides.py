"""Every command in the README and in the guides of docs/ does what the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_smolvlm.cli.terminal.commands import ALIASES, COMMANDS
from mlx_smolvlm.convert.catalog import PHOTO_MODEL, list_figures
from tests.helpers import fake_hub
from tests.helpers.command import FORKS, environment
from tests.helpers.forked_command import Runner
from tests.helpers.guides import (
    ELSEWHERE,
    KINDS,
    MAC,
    PAGES,
    ROOT,
    Block,
    Desk,
    fill_hub,
    format_gb,
    make_model_table,
    parse_command,
    read_blocks,
    read_commands,
)

BLOCKS = [block for page in PAGES for block in read_blocks(page)]
# Of pip, a shell and Debian's Python.
OTHERS_MESSAGES = {
    "No matching distribution found for mlx",
    "command not found: mlx-smolvlm",
    "ensurepip is not available",
}
NOT_RUN = 9  # blocks that are only parsed, each with its reason


@pytest.fixture(scope="module")
def machine(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[dict[str, str], Runner | None]]:
    """The environment of a user who has nothing yet, with a hub that has all models.

    A process that has imported the hub's client forks the commands, where that can be done.
    """
    home = tmp_path_factory.mktemp("home")
    with fake_hub.running() as hub:
        fill_hub(hub, home / "source")
        changes = {
            "HOME": str(home),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home / "hub"),
            "HF_TOKEN": fake_hub.TOKEN,
            "HF_HUB_OFFLINE": "0",
            "MLX_SMOLVLM_CACHE": str(home / "cache"),
            "MLX_SMOLVLM_HISTORY": str(home / "history"),
        }
        modules = ["huggingface_hub._snapshot_download", "huggingface_hub.hf_api"]
        runner = Runner(environment(**changes), modules) if FORKS else None
        yield environment(**changes), runner
        if runner:
            runner.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(
    page: Path,
    machine: tuple[dict[str, str], Runner | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment, runner = machine
    desk = Desk(tmp_path / "work", environment, runner)
    monkeypatch.chdir(desk.folder)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", environment["HF_ENDPOINT"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", environment["HF_HOME"] + "/hub")
    for block in BLOCKS:
        if block.page == page:
            desk.run_block(block)


def test_every_block_states_its_kind() -> None:
    for block in BLOCKS:
        assert block.kind in KINDS, block.place
        if block.kind == "text":  # it would hide a command from the test above
            assert not re.search(
                r"^(\$|mlx-smolvlm|make|pip|uvx?|python) ", block.text, re.MULTILINE
            )


def test_few_blocks_are_not_run() -> None:
    unrun = [block for block in BLOCKS if block.key == "not run"]
    assert len(unrun) == NOT_RUN, [f"{block.place}: {block.value}" for block in unrun]


def test_commands_of_other_tests_are_in_them() -> None:
    said = {
        command.line for block in BLOCKS if block.kind == "bash" for command in read_commands(block)
    }
    assert set(ELSEWHERE) <= said
    for path, text in ELSEWHERE.values():
        assert text in (ROOT / path).read_text()


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("bash", "mlx-smolvlm chat --no-such-option\n", "No such option"),
        ("bash", "cat absent\n", "absent"),
        (
            "console",
            '$ mlx-smolvlm chat -i examples/one.png "What is it?"\nA blue cross.\n',
            "A red",
        ),
        ("console", "$ mlx-smolvlm chat\ndemo: ...\n> Hello\nGoodbye!\n", "Hello! Show me"),
        ("python", "assert 1 == 2, 'so'\n", "so"),
        ("json", "{'a': 1}\n", "property name"),
    ],
)
def test_a_page_that_is_wrong_is_noticed(
    machine: tuple[dict[str, str], Runner | None], tmp_path: Path, kind: str, text: str, said: str
) -> None:
    desk = Desk(tmp_path / "work", *machine)
    with pytest.raises(Exception, match=said):
        desk.run_block(Block(ROOT / "README.md", 1, kind, text, "", ""))


@pytest.mark.parametrize(
    "line",
    ["mlx-smolvlm chat --no-such-option", "mlx-smolvlm chat --bits", "mlx-smolvlm models rm"],
)
def test_a_command_that_is_not_run_is_parsed(line: str) -> None:
    with pytest.raises(
        Exception, match=r"No such option|requires an argument|Missing (argument|parameter)"
    ):
        parse_command(line)


def test_the_notebook_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jupyter runs a notebook in its own folder."""
    path = ROOT / "examples" / "quick_start.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    monkeypatch.chdir(path.parent)
    namespace = {"__name__": "__main__"}
    for cell in cells:
        exec("".join(cell["source"]), namespace)
    said = capsys.readouterr().out
    assert said.startswith("A blue square, a black star and a yellow diamond.\n")
    assert "0 tiles were encoded for the second question\n" in said
    assert said.endswith("A white star moves to the left.\n")
    commented = "".join(cells[-1]["source"]).replace("# ", "")
    compile(commented, str(path), "exec")
    assert commented.startswith("vlm = smolvlm.load(")


def test_the_readme_has_the_sizes_that_the_command_prints() -> None:
    text = (ROOT / "README.md").read_text()
    table = make_model_table()
    assert table in text, table
    photo = next(one for one in list_figures(MAC) if one.alias == PHOTO_MODEL)
    assert f"-m {PHOTO_MODEL}\n" in text
    assert f"downloads {format_gb(photo.download_bytes)}, once" in text
    assert f"needs {format_gb(photo.answer_bytes[photo.fits_bits or 4])} of memory" in text


def test_the_readme_is_short_and_its_figures_are_measured() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 120
    reasons = text.partition("## Why not mlx-vlm?")[2].partition("\n## ")[0]
    measured = (ROOT / "docs" / "measured.md").read_text()
    figures = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:MB| MB| %)?", reasons)
    assert len(figures) >= 7
    for figure in figures:
        if figure != "256":
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", measured), figure


def test_the_guide_lists_the_commands_of_a_conversation() -> None:
    text = (ROOT / "docs" / "chat.md").read_text()
    listed = re.findall(r"^\| (`.*?) \|", text.partition("## Commands")[2], re.MULTILINE)
    names = {name for row in listed for name in re.findall(r"`([/\w?]+)", row)}
    assert names >= {one.name for one in COMMANDS}
    assert names <= {one.name for one in COMMANDS} | set(ALIASES)


def test_the_messages_that_the_guide_explains_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = set(re.findall(r'^\*\*"(.*?)"', text, re.MULTILINE))
    assert messages >= OTHERS_MESSAGES
    folders = ("mlx_smolvlm", "cli", "convert", "train", "demo_recipe")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    sources = "\n".join(path.read_text() for path in [*paths, ROOT / "Makefile"])
    sources = re.sub(r'"\n\s+f?"', "", sources)  # a string in two lines
    for message in messages - OTHERS_MESSAGES:
        assert message in sources, message


def test_every_guide_can_be_found() -> None:
    linked = "".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in linked, f"nothing leads to {page.name}"
