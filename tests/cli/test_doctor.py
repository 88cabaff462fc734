"""`doctor` tells what is broken from what is not, and says so by its exit status."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import typer

from mlx_smolvlm.checkpoint.load import load_model
from mlx_smolvlm.cli import doctor_checks
from mlx_smolvlm.cli.doctor import doctor
from mlx_smolvlm.convert.hub import resolve
from mlx_smolvlm.convert.run import convert_checkpoint
from tests.helpers import hf_folder as hf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    template = (resolve("demo") / "chat_template.jinja").read_text()  # one that renders a question
    monkeypatch.setattr(hf, "TEMPLATE", template)
    return tmp_path / "cache"


def findings(capsys, *models: str) -> tuple[int, dict[str, list[dict]]]:
    """Exit status, and the findings by name."""
    status = 0
    try:
        doctor(models, as_json=True)
    except typer.Exit as left:
        status = left.exit_code
    values = json.loads(capsys.readouterr().out)
    assert values["ok"] == (status == 0)
    result: dict[str, list[dict]] = {}
    for one in values["findings"]:
        result.setdefault(one["name"], []).append(one)
    return status, result


def test_a_healthy_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    resolve(hf.make(tmp_path / "s"))
    status, found = findings(capsys)
    assert status == 0, found
    named = {
        *("mlx-smolvlm", "python", "system", "packages", "device", "memory", "cache", "hub cache"),
        *("terminal", "encoding", "network", "environment", "pictures", "videos", "demo"),
    }
    assert named <= set(found)
    assert "mlx 0." in found["packages"][0]["text"]
    assert "1 conversions, " in found["cache"][0]["text"]
    assert "HF_TOKEN is set" in found["environment"][0]["text"]
    assert "hf_secret" not in json.dumps(found)
    (model,) = [value for name, value in found.items() if name.startswith("local/s-")]
    assert model[0]["text"] == "every file is what was written"


def test_a_changed_byte_in_the_cache_is_found(tmp_path, capsys):
    folder = resolve(hf.make(tmp_path / "s"))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    load_model(folder)  # nothing else sees it
    status, found = findings(capsys)
    assert status == 1
    (one,) = [value[0] for value in found.values() if value[0]["status"] == "broken"]
    assert "model.safetensors differs from its sum" in one["text"]
    assert str(folder) in one["advice"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_each_damaged_file_of_a_named_folder_is_found(tmp_path, capsys, name):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    assert findings(capsys, str(out))[0] == 0
    (out / name).write_text("{% x")
    (out / "SHA256SUMS").unlink()  # found without sums too
    status, found = findings(capsys, str(out))
    assert (status, list(found)) == (1, [str(out)])


def test_without_sums_it_is_a_note(tmp_path, capsys):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    (out / "SHA256SUMS").unlink()
    status, found = findings(capsys, str(out))
    assert (status, found[str(out)][0]["status"]) == (0, "note")


def test_leftovers_are_told_with_their_cure(tmp_path, capsys, cache):
    folder = resolve(hf.make(tmp_path / "s"))
    left = Path(shutil.copytree(folder, folder.parent / ".x.1234.partial"))
    status, found = findings(capsys)
    assert status == 0
    assert f"{left.name} is unfinished" in found["cache"][1]["text"]
    assert found["cache"][1]["advice"].startswith("mlx-smolvlm models rm 'local/s-")
    (folder / "model.safetensors").unlink()
    status, found = findings(capsys)
    assert (status, found["cache"][2]["status"]) == (1, "broken")


def broken(part) -> list[doctor_checks.Finding]:
    return [finding for finding in part() if finding.status == "broken"]


def test_a_decoder_that_fails_is_found(monkeypatch):
    assert not broken(doctor_checks.check_videos)
    with monkeypatch.context() as patch:
        patch.setattr(doctor_checks, "_make_clip", lambda: b"no clip")
        assert broken(doctor_checks.check_videos)
    with monkeypatch.context() as patch:
        patch.setattr(doctor_checks, "CLIP_FRAMES", 9)
        clip = doctor_checks._make_clip()
        patch.setattr(doctor_checks, "CLIP_FRAMES", 8)
        patch.setattr(doctor_checks, "_make_clip", lambda: clip)
        assert "9 of 8 frames" in broken(doctor_checks.check_videos)[0].text
    assert not broken(doctor_checks.check_pictures)
    monkeypatch.setattr(doctor_checks, "PICTURES", ("PNG", "NONE"))
    assert "not read: NONE" in broken(doctor_checks.check_pictures)[0].text


def test_a_demo_that_does_not_answer_is_found(monkeypatch):
    def fail(_name):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("mlx_smolvlm.load", fail)
    assert "no kernel" in broken(doctor_checks.check_demo)[0].text


def test_a_device_that_miscounts_is_found(monkeypatch):
    import mlx.core as mx

    assert not broken(doctor_checks.check_device)
    monkeypatch.setattr(mx, "eye", lambda n: mx.ones((n, n)))
    assert "multiplies wrongly" in broken(doctor_checks.check_device)[0].text


def test_missing_packages_and_full_or_closed_disks_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_checks, "NEEDED", ("mlx", "no-such-package"))
    assert broken(doctor_checks.check_software)[0].advice == "pip install no-such-package"
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda _path: usage)
    notes = [finding for finding in doctor_checks.check_storage() if finding.status == "note"]
    assert {finding.name for finding in notes} == {"cache", "hub cache"}
    monkeypatch.setattr(doctor_checks.os, "access", lambda *_: False)
    assert "not writable" in broken(doctor_checks.check_storage)[0].text


def test_a_locale_without_utf8_is_a_note(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    notes = [finding for finding in doctor_checks.check_environment() if finding.name == "encoding"]
    assert notes[0].status == "note"


def test_lines_for_people(tmp_path, capsys):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    os.truncate(out / "model.safetensors", 5000)
    with pytest.raises(typer.Exit):
        doctor(("demo", str(out)), as_json=False)
    said = capsys.readouterr()
    assert said.out.splitlines()[0].startswith(("ok      demo: ", "note    demo: "))
    assert f"BROKEN  {out}: " in said.out
    assert said.err == "1 broken\n"
