"""A destination appears whole or not at all; memory stays small."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mlx_smolvlm.checkpoint import writer
from mlx_smolvlm.checkpoint.load import load_model, read_config
from mlx_smolvlm.convert import run
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import hf_folder as hf


def python(code: str, *arguments: object) -> subprocess.Popen:
    """A Python process that runs `code`."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finished(process: subprocess.Popen) -> str:
    """What a process printed, once it has ended well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_all_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    synced, before, real_sync, real_rename = set(), [], os.fsync, Path.rename

    def fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def rename(self, target):
        before.append(set(synced))
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with writer.stage_folder(tmp_path / "out", force=False) as partial:
        (partial / "a").write_text("a")
        (partial / "b").write_text("b")
    out = tmp_path / "out"
    assert before == [{path.stat().st_ino for path in (out, out / "a", out / "b")}]
    assert tmp_path.stat().st_ino in synced


# For each n that it reads, a process that kills itself at the n-th call of a function that touches
# the destination. It is forked, since importing takes longer than converting; nothing here uses
# MLX before. Prints its exit status.
KILLED = """
    import os, shutil, signal, sys
    from pathlib import Path
    import mlx.core as mx
    from mlx_smolvlm.checkpoint import writer
    from mlx_smolvlm.convert.run import convert_checkpoint
    from mlx_smolvlm.checkpoint.writer import FolderWriter

    source, dest, force = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
    writer.SHARD_BYTES = 150_000
    calls = 0

    def deadly(function):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls == n and n % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

    mx.save_safetensors = deadly(mx.save_safetensors)
    shutil.rmtree = deadly(shutil.rmtree)
    os.fsync = deadly(os.fsync)
    for name in ("mkdir", "rename"):
        setattr(Path, name, deadly(getattr(Path, name)))
    for name in ("write_text", "copy", "finish"):
        setattr(FolderWriter, name, deadly(getattr(FolderWriter, name)))

    for line in sys.stdin:
        n = int(line)
        if pid := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print(status, flush=True)
        else:
            convert_checkpoint(source, dest, force=force)
            os._exit(0 if calls < n else 3)
"""


@pytest.mark.parametrize("force", [False, True])
def test_a_killed_conversion_leaves_no_checkpoint_and_a_rerun_completes(tmp_path, force):
    source = hf.make(tmp_path / "s")
    dest = tmp_path / "made" / "out"
    if force:
        convert_checkpoint(source, dest, ConvertOptions(bits=8))
    deaths = 0
    killer = python(KILLED, source, dest, force)
    for n in range(1, 60, 2 if force else 1):
        killer.stdin.write(f"{n}\n")
        killer.stdin.flush()
        status = int(killer.stdout.readline())
        if status == 0:
            break
        assert status == -signal.SIGKILL
        deaths += 1
        if dest.exists():  # whole: the old one, or the new one renamed before the kill
            load_model(dest)
            if not force:
                assert n > 10
                break
    assert finished(killer) == ""
    assert deaths > 8
    convert_checkpoint(source, dest, force=True)
    assert [path.name for path in dest.parent.iterdir()] == ["out"]
    load_model(dest)


def test_leftovers_of_the_living_stay(tmp_path):
    living, dead = tmp_path / ".out.aaaa.partial", tmp_path / ".out.bbbb.partial"
    other = tmp_path / ".outer.cccc.partial"
    for path in (living, dead, other):
        path.mkdir()
        (path / "part-1.safetensors").write_text("x")
    lock = os.open(living, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    os.close(lock)
    assert (living.exists(), dead.exists(), other.exists()) == (True, False, True)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    source = hf.make(tmp_path / "s")

    def full(*_args):
        raise RuntimeError("[write] disk full")

    monkeypatch.setattr(writer.mx, "save_safetensors", full)
    with pytest.raises(CheckpointError, match="disk full"):
        convert_checkpoint(source, tmp_path / "a" / "out")
    assert list((tmp_path / "a").iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path):
    def stop(*_args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    usage = run.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _path: usage)
    monkeypatch.setattr(run, "_write_weights", None)
    with pytest.raises(CheckpointError, match=r"0\.0 GB free"):
        convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")


def test_the_size_is_known_beforehand(tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(run, "_check_space", lambda _folder, size: needed.append(size))
    source = hf.make(tmp_path / "s")
    options = [
        ConvertOptions(),
        ConvertOptions(bits=4),
        ConvertOptions(bits=3, group_size=32, dtype="float16"),
        ConvertOptions(mode="mxfp4"),
    ]
    for i, option in enumerate(options):
        out = convert_checkpoint(source, tmp_path / str(i), option)
        header = int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
        assert needed[-1] == (out / "model.safetensors").stat().st_size - 8 - header


# What is there already


def test_only_our_checkpoints_are_replaced_and_only_by_force(tmp_path):
    source = hf.make(tmp_path / "s")
    out = tmp_path / "out"
    out.mkdir()
    convert_checkpoint(source, out)  # an empty folder is no obstacle
    with pytest.raises(CheckpointError, match="already holds a checkpoint; use force=True"):
        convert_checkpoint(source, out, ConvertOptions(bits=4))
    assert read_config(out).quantization.text is None
    convert_checkpoint(source, out, ConvertOptions(bits=4), force=True)
    assert read_config(out).quantization.text.bits == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="not empty and not an mlx-smolvlm checkpoint"):
            convert_checkpoint(source, tmp_path / "mine", force=force)
        with pytest.raises(CheckpointError, match="not empty and not an mlx-smolvlm checkpoint"):
            convert_checkpoint(source, source, force=force)
        with pytest.raises(CheckpointError, match="is not a folder"):
            convert_checkpoint(source, tmp_path / "file", force=force)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_destination_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="out cannot be written"):
        convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "file" / "out")


def test_a_destination_filled_in_the_meantime_is_kept(tmp_path):
    source = hf.make(tmp_path / "s")
    out = tmp_path / "out"

    def rival(done, total, _name):
        if done == total:
            out.mkdir()
            (out / "theirs").write_text("x")

    with pytest.raises(CheckpointError, match="not empty"):
        convert_checkpoint(source, out, progress=rival)
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s"]


def test_a_destination_filled_at_the_last_moment_is_kept(tmp_path, monkeypatch):
    source = hf.make(tmp_path / "s")
    first = convert_checkpoint(source, tmp_path / "first")
    check, checks = writer.check_destination, []

    def rival_after_the_last_check(dest, force):
        check(dest, force)
        checks.append(dest)
        if len(checks) == 2:
            first.rename(dest)

    monkeypatch.setattr(writer, "check_destination", rival_after_the_last_check)
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        convert_checkpoint(source, tmp_path / "out", ConvertOptions(bits=4))
    assert read_config(tmp_path / "out").quantization.text is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s"]


RIVALS = """
    import sys, time
    from mlx_smolvlm.convert.run import convert_checkpoint
    from mlx_smolvlm.errors import CheckpointError
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        convert_checkpoint(sys.argv[1], sys.argv[2], progress=lambda *_: time.sleep(0.002))
        print("won")
    except CheckpointError as error:
        print(error)
"""


def test_two_conversions_at_once_give_one_checkpoint(tmp_path):
    source = hf.make(tmp_path / "s")
    command = [sys.executable, "-c", textwrap.dedent(RIVALS), str(source), str(tmp_path / "out")]
    pair = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in pair:
        assert process.stdout.readline() == "ready\n"
    said = []
    for process in pair:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in pair:
        said.append(process.communicate(timeout=120)[0].strip())
    assert sorted(text == "won" for text in said) == [False, True]
    assert any("already holds a checkpoint" in text for text in said), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s"]
    load_model(tmp_path / "out")


# Memory

MEASURE = """
    import json, resource, sys
    import mlx.core as mx
    from mlx_smolvlm.checkpoint import writer
    from mlx_smolvlm.convert.options import ConvertOptions
    from mlx_smolvlm.convert.run import convert_checkpoint
    writer.SHARD_BYTES = 32 * 10**6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss in bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    bits = int(sys.argv[3])
    convert_checkpoint(sys.argv[1], sys.argv[2], ConvertOptions(bits=bits))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps([mx.get_peak_memory(), after - before]))
"""


@pytest.mark.parametrize("bits", [16, 4])
def test_memory_is_bounded_by_a_shard_and_not_by_the_checkpoint(tmp_path, bits):
    values = hf.settings(
        text__hidden_size=512,
        text__intermediate_size=2048,
        text__num_hidden_layers=14,
        text__num_attention_heads=8,
        text__num_key_value_heads=8,
        text__head_dim=64,
        vision__hidden_size=256,
        vision__intermediate_size=1024,
    )
    source = hf.make(tmp_path / "s", values, shards=2)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 220 * 10**6
    mlx_peak, resident = json.loads(finished(python(MEASURE, source, tmp_path / "out", bits)))
    assert mlx_peak < 64 * 10**6  # a shard, and the largest module twice
    assert resident < size / 2
    for path in source.glob("*.safetensors"):
        path.unlink()
