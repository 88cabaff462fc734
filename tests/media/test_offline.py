"""With --offline or the environment variables, no process opens a socket."""

import subprocess
from pathlib import Path

import pytest

from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.media.fetch import is_offline
from tests.helpers import command
from tests.helpers import hf_folder as hf

# Lets the command exit when it opens a socket or looks up a name.
GUARD = """
import os, sys
def guard(event, _arguments):
    if event.startswith("socket.") and event != "socket.__init__":
        os.write(2, f"SOCKET {event}".encode())
        os._exit(99)
sys.addaudithook(guard)
"""


def run(*arguments: object, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "MLX_SMOLVLM_CACHE": str(cwd / "cache"),
        "HF_HOME": str(cwd / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    return command.run_text(
        *map(str, arguments), cwd=cwd, env={**environment, **changes}, prelude=GUARD
    )


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a source, and owner/ours and owner/vlm in the hub's cache."""
    source = hf.make(tmp_path / "s")
    ours = convert_checkpoint(source, tmp_path / "ours")
    for name, made in (("ours", ours), ("vlm", source)):
        repo = tmp_path / "hf" / "hub" / f"models--owner--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("c" * 40)
        (repo / "snapshots").mkdir()
        made.rename(repo / "snapshots" / ("c" * 40))
    return tmp_path


def test_the_guard_catches_what_asks_the_network(place):
    said = run("chat", "Hi", "-m", "owner/absent", cwd=place)
    assert said.returncode == 99, said.stderr
    said = run("chat", "Hi", "-i", "http://127.0.0.1:9/a.png", cwd=place)
    assert said.returncode == 99, said.stderr


ENVIRONMENT = [{}, {"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "true"}]


@pytest.mark.parametrize("changes", ENVIRONMENT)
def test_nothing_asks_the_network(place, changes):
    flag = () if changes else ("--offline",)
    for arguments, status, word in (
        (("chat", "Hi", "-m", "demo", "--max-tokens", "2", *flag), 0, ""),
        (("convert", "owner/vlm", "made", *flag), 0, "wrote made"),
        (("convert", "owner/absent", "made2", *flag), 1, "offline was asked for"),
        (("chat", "Hi", "-m", "owner/vlm", *flag), 1, "the chat template"),
        (("chat", "Hi", "-m", "owner/ours", *flag), 1, "the chat template"),
        (("chat", "Hi", "-m", "owner/absent", *flag), 1, "offline was asked for"),
        (("chat", "Hi", "-i", "http://127.0.0.1:9/a.png", *flag), None, "needs the network"),
        (("chat", "Hi", "-v", "http://127.0.0.1:9/a.mp4", *flag), None, "needs the network"),
        (("models",), 0, ""),
        (("doctor",), 1, "broken"),  # that template
    ):
        said = run(*arguments, cwd=place, **changes)
        assert said.returncode != 99, (arguments, said.stderr)
        assert status is None or said.returncode == status, (arguments, said.stderr)
        assert said.returncode != 0 or status is not None, arguments
        assert word in said.stderr, (arguments, said.stderr)


def test_what_was_converted_needs_no_network_even_online(place):
    assert run("convert", "owner/vlm", "made", "--offline", cwd=place).returncode == 0
    for name in ("made", "owner/ours"):
        said = run("chat", "Hi", "-m", name, cwd=place)
        assert (said.returncode, "the chat template" in said.stderr) == (1, True), said.stderr


@pytest.mark.parametrize(
    ("value", "wanted"), [("1", True), ("yes", True), ("ON", True), ("0", False), ("", False)]
)
def test_the_environment_is_read_as_the_hub_reads_it(monkeypatch, value, wanted):
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert is_offline() is wanted
    assert is_offline(True)
