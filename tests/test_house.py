"""The rules of the house that a machine can check."""

import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "mlx_smolvlm"
LEAVES = {
    "vision", "connector", "text", "cache", "storage", "bounded", "offline",
    "cache_options", "sampling", "picture", "fetch", "image", "decode",
    "readers", "scenes", "frames", "video", "schema", "files", "blas", "logprobs",
    "values", "budget", "animation", "timeline", "download", "quoting",
}  # fmt: skip


def imported(path: Path, lazy: bool) -> set[str]:
    """Modules that `path` imports, those inside of functions only if `lazy`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", sorted(LIBRARY.glob("*.py")), ids=lambda path: path.name)
def test_the_library_does_not_know_its_users(path: Path) -> None:
    # hub.py converts on first use: the one arrow from the library to the converter.
    allowed = ("mlx_smolvlm.convert",) if path.name == "hub.py" else ()
    for name in imported(path, lazy=True):
        for part in ("convert", "cli", "train"):
            if name.startswith(f"mlx_smolvlm.{part}"):
                assert name.startswith(allowed or ("none",)), f"{path.name} imports {name}"
    top = imported(path, lazy=False)
    assert not any(name.startswith("mlx_smolvlm.convert") for name in top)


@pytest.mark.parametrize("folder", ["convert", "train"])
def test_the_converter_and_training_do_not_know_the_command_line(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        assert not any(n.startswith("mlx_smolvlm.cli") for n in imported(path, lazy=True))


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_leaves_know_only_configuration_and_errors(name: str) -> None:
    known = {f"mlx_smolvlm.{other}" for other in ("config", "errors", *LEAVES)}
    own = {n for n in imported(LIBRARY / f"{name}.py", lazy=True) if n.startswith("mlx_smolvlm")}
    assert own <= known


def test_nothing_heavy_at_run_time() -> None:
    for folder in ("mlx_smolvlm", "convert", "cli", "train"):
        for path in (ROOT / folder).glob("*.py"):
            for module in imported(path, lazy=True):
                assert module.split(".")[0] not in {"torch", "transformers"}, path


def test_folders_are_linked_into_the_package() -> None:
    for name in ("convert", "cli", "train"):
        assert os.readlink(LIBRARY / name) == f"../{name}"


def test_every_public_name_has_a_docstring() -> None:
    for folder in ("mlx_smolvlm", "convert", "cli", "train"):
        for path in (ROOT / folder).glob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                    undocumented = (path.name, node.name) == ("app.py", "top")
                    assert ast.get_docstring(node) or undocumented, f"{path.name}: {node.name}"


def test_pictures_are_opened_in_listed_formats_alone() -> None:
    """Pillow would start Ghostscript for an EPS, whatever the file is called."""
    found = 0
    for folder in ("mlx_smolvlm", "convert", "cli", "train", "demo_recipe"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                    assert "formats" in {word.arg for word in node.keywords}, path
                    found += 1
    assert found >= 3


def test_native_readers_see_no_file_that_was_not_checked() -> None:
    """`load_tensors` checks a header before `mx.load` reads the file; nothing else may call it."""
    readers = {("mx", "load"), ("np", "load"), ("numpy", "load"), ("torch", "load")}
    calls = set()
    for folder in ("mlx_smolvlm", "convert", "cli", "train", "demo_recipe"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    if (node.value.id, node.attr) in readers:
                        calls.add(f"{folder}/{path.name}")
                elif isinstance(node, ast.Name | ast.alias):
                    name = node.id if isinstance(node, ast.Name) else node.name
                    assert name not in ("safe_open", "load_file", "memmap"), path
    assert calls == {"mlx_smolvlm/safetensors.py"}
