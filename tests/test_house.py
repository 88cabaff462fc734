"""The rules of the house that a machine can check."""

import ast
import importlib.metadata
import os
import re
import sys
import tomllib
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from mlx_smolvlm.cli.doctor_checks import EXTRAS, NEEDED

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "mlx_smolvlm"
PACKAGE_FOLDERS = ("mlx_smolvlm", "bench", "convert", "documents", "cli", "train")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Declared, but never imported.
LOADED_OTHERWISE = {"cmeel-openblas"}  # a shared library that runtime.py opens by its path
LEAVES = {
    "files", "records", "runtime",
    "kv.bounded", "kv.cache", "kv.options", "model.connector", "model.text", "model.vision",
    "media.animation", "media.boxes", "media.budget", "media.decode", "media.download",
    "media.fetch", "media.formats", "media.heic", "media.picture",
    "media.readers", "media.tiles", "media.timeline", "media.video",
    "generate.json_schema", "generate.sampling",
}  # fmt: skip
PACKAGE = "mlx_smolvlm"

# Lowest first. A module imports its own folder and those before it; a file directly in the
# package stands for itself.
LAYERS = (
    *("errors", "runtime", "files", "tuning", "records", "config"),
    *("kv", "model", "checkpoint", "media", "prompt", "reuse", "generate"),
    *("conversation", "smolvlm", "mlx_smolvlm"),
    *("train", "train/evaluate", "convert", "convert/compare", "convert/quant"),
    *("convert/compare/__init__", "convert/__init__", "bench", "documents", "cli", "__main__"),
)
# Reading pictures and wording prompts needs no network and no checkpoint.
APART = {(above, below) for above in ("media", "prompt") for below in ("kv", "model", "checkpoint")}
# `load` converts a checkpoint on first use: the one arrow up, and a lazy one.
EXCEPTION = ("mlx_smolvlm.smolvlm", "mlx_smolvlm.convert.hub")


def modules() -> dict[str, Path]:
    """The files of the package, by the name under which they are imported."""
    found = {}
    for path in list_package_files():
        parts = [*path.relative_to(ROOT).with_suffix("").parts]
        parts = parts if parts[0] == PACKAGE else [PACKAGE, *parts]
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def folder_of(module: str, path: Path) -> str:
    """The folder that `module` belongs to.

    A file directly in the package is its own, and so is what lists a folder's public names.
    `cli` counts as one: the command `chat` starts the interactive program, which is made of
    the commands' parts.
    """
    parts = module.split(".")[1:]
    if parts[:1] == ["cli"]:
        return "cli"
    if path.name == "__init__.py":
        return "/".join([*parts, "__init__"]) if parts else PACKAGE
    return "/".join(parts[:-1] or parts)


def imports(path: Path, known: Mapping[str, object]) -> Iterator[tuple[str, bool]]:
    """Modules that the file `path` imports, and whether it does so inside of a function.

    Those that it imports for its type annotations alone count as well.
    """

    def visit(node: ast.AST, is_lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, is_lazy) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            full = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            yield from ((name, is_lazy) for name in full or {node.module} & set(known))
        is_lazy |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_lazy)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


@pytest.fixture(scope="module")
def arrows() -> dict[tuple[str, str], bool]:
    """Every pair of a module and one that it imports, and whether it only does so lazily."""
    known = modules()
    found: dict[tuple[str, str], bool] = {}
    for module, path in known.items():
        for other, is_lazy in imports(path, known):
            found[module, other] = found.get((module, other), True) and is_lazy
    assert found.pop(EXCEPTION), "load imports the converter before it is needed"
    return found


def test_no_cycle_between_files(arrows: dict[tuple[str, str], bool]) -> None:
    check_acyclic(arrows)


def test_no_cycle_between_folders(arrows: dict[tuple[str, str], bool]) -> None:
    check_acyclic(between_folders(arrows))


def test_imports_run_one_way(arrows: dict[tuple[str, str], bool]) -> None:
    between = between_folders(arrows)
    wrong = {
        f"{first} imports {second}: {', '.join(files)}"
        for (first, second), files in between.items()
        if LAYERS.index(first) < LAYERS.index(second) or (first, second) in APART
    }
    assert not wrong, "\n".join(sorted(wrong))


def between_folders(arrows: Mapping[tuple[str, str], bool]) -> dict[tuple[str, str], list[str]]:
    """Pairs of folders of which the first imports the second, with the files' names."""
    known = modules()
    found: dict[tuple[str, str], list[str]] = {}
    for first, second in sorted(arrows):
        pair = folder_of(first, known[first]), folder_of(second, known[second])
        if pair[0] != pair[1]:
            names = [name.removeprefix(f"{PACKAGE}.") for name in (first, second)]
            found.setdefault(pair, []).append(" -> ".join(names))
    return found


def check_acyclic(arrows: Mapping[tuple[str, str], object]) -> None:
    """Fail with the cycle that `arrows` have, if they have one."""
    graph: dict[str, set[str]] = {}
    for first, second in arrows:
        graph.setdefault(first, set()).add(second)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@cache
def imported(path: Path, lazy: bool) -> frozenset[str]:
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
    return frozenset(names)


@pytest.mark.parametrize(
    "path",
    sorted(set(LIBRARY.rglob("*.py")) - {LIBRARY / "__main__.py"}),  # which is the command
    ids=lambda path: str(path.relative_to(LIBRARY)),
)
def test_the_library_does_not_know_its_users(path: Path) -> None:
    # `load` converts on first use: the one arrow from the library to the converter.
    allowed = ("mlx_smolvlm.convert.hub",) if path == LIBRARY / "smolvlm.py" else ()
    for name in imported(path, lazy=True):
        for part in ("bench", "convert", "documents", "cli", "train"):
            if name.startswith(f"mlx_smolvlm.{part}"):
                assert name.startswith(allowed or ("none",)), f"{path.name} imports {name}"
    top = imported(path, lazy=False)
    assert not any(name.startswith("mlx_smolvlm.convert") for name in top)


@pytest.mark.parametrize("folder", ["convert", "train"])
def test_the_converter_and_training_do_not_know_the_command_line(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert not any(n.startswith("mlx_smolvlm.cli") for n in imported(path, lazy=True))


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_leaves_know_only_configuration_and_errors(name: str) -> None:
    known = {f"mlx_smolvlm.{other}" for other in ("config", "errors", *LEAVES)}
    own = {
        n
        for n in imported(LIBRARY / f"{name.replace('.', '/')}.py", lazy=True)
        if n.startswith("mlx_smolvlm")
    }
    assert own <= known


def test_nothing_heavy_at_run_time() -> None:
    for folder in PACKAGE_FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for module in imported(path, lazy=True):
                assert module.split(".")[0] not in {"torch", "transformers", "mlx_lm"}, path


def list_package_files() -> list[Path]:
    """The Python files that are installed. `rglob` does not follow the links in the package."""
    return [path for name in PACKAGE_FOLDERS for path in (ROOT / name).rglob("*.py")]


def normalize_name(requirement: str) -> str:
    """The normalized name at the start of `requirement`, such as "mlx" of "mlx[cpu]>=0.32"."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def read_declared(*extras: str) -> set[str]:
    """Normalized names of the libraries that pyproject.toml requires, alone and for `extras`."""
    project = PYPROJECT["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][name] for name in extras)]
    return {normalize_name(requirement) for names in lists for requirement in names}


def find_libraries(paths: list[Path]) -> dict[str, set[str]]:
    """Libraries that `paths` import, each with the normalized names of what it may come from."""
    modules = {name.partition(".")[0] for path in paths for name in imported(path, lazy=True)}
    distributions = importlib.metadata.packages_distributions()
    return {
        module: {normalize_name(name) for name in distributions.get(module, [module])}
        for module in modules - sys.stdlib_module_names - {"mlx_smolvlm"}
    }


def test_every_library_that_is_imported_is_declared() -> None:
    libraries = find_libraries(list_package_files())
    missing = {module for module, names in libraries.items() if not names & read_declared("json")}
    assert not missing, "imported, but not in pyproject.toml"
    used = set[str]().union(*libraries.values(), LOADED_OTHERWISE)
    assert read_declared("json") <= used, "in pyproject.toml, but never imported"


def test_what_tests_and_the_recipe_import_is_declared() -> None:
    folders = [ROOT / "tests", ROOT / "demo_recipe"]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    own = {"tests", "benchmarks", "demo_recipe"}
    known = read_declared("json", "dev", "oracles")
    (bare,) = re.findall(r"--no-deps (.+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    known |= set(re.findall(r"[a-z][a-z0-9-]+", bare))  # without their own dependencies
    for module, names in find_libraries(paths).items():
        assert module in own or names & known, f"{module} is not in pyproject.toml"


def test_doctor_lists_the_libraries_that_are_declared() -> None:
    assert {normalize_name(name) for name in NEEDED} == read_declared() - LOADED_OTHERWISE
    assert {normalize_name(name) for name in EXTRAS} == read_declared("json") - read_declared()


def test_the_package_does_not_import_the_demo_recipe() -> None:
    for path in list_package_files():
        for name in imported(path, lazy=True):
            assert name.split(".")[0] != "demo_recipe", path


def test_wheels_hold_every_folder_of_the_package_and_no_other() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert set(setuptools) == {"packages", "package-dir", "package-data"}  # nothing is found
    folders = {path.parent.relative_to(ROOT) for path in list_package_files()}
    names = {".".join(folder.parts) for folder in folders}
    top = {name if name.startswith("mlx_smolvlm") else f"mlx_smolvlm.{name}" for name in names}
    assert sorted(setuptools["packages"]) == sorted(top)
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
    links = {f"mlx_smolvlm.{name}": name for name in PACKAGE_FOLDERS[1:]}
    assert setuptools["package-dir"] == links


def test_wheels_hold_the_demo_and_the_other_data() -> None:
    data: dict[str, list[str]] = PYPROJECT["tool"]["setuptools"]["package-data"]
    found = {
        path.name
        for package, patterns in data.items()
        for pattern in patterns
        for path in LIBRARY.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    demo = {path.name for path in (LIBRARY / "demo").iterdir()}
    assert found == demo | {"py.typed", "calibration.txt"}
    assert all((ROOT / name).is_file() for name in PYPROJECT["project"]["license-files"])


def test_folders_are_linked_into_the_package() -> None:
    for name in ("bench", "convert", "documents", "cli", "train"):
        assert os.readlink(LIBRARY / name) == f"../{name}"


def test_every_public_name_has_a_docstring() -> None:
    for folder in PACKAGE_FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                    undocumented = (path.name, node.name) == ("command_table.py", "top")
                    assert ast.get_docstring(node) or undocumented, f"{path.name}: {node.name}"


def test_pictures_are_opened_in_listed_formats_alone() -> None:
    """Pillow would start Ghostscript for an EPS, whatever the file is called."""
    found = 0
    for folder in (*PACKAGE_FOLDERS, "demo_recipe"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                    assert "formats" in {word.arg for word in node.keywords}, path
                    found += 1
    assert found >= 3


def test_native_readers_see_no_file_that_was_not_checked() -> None:
    """`load_tensors` checks a header before `mx.load` reads the file; nothing else may call it."""
    readers = {("mx", "load"), ("np", "load"), ("numpy", "load"), ("torch", "load")}
    calls = set()
    for folder in (*PACKAGE_FOLDERS, "demo_recipe"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    if (node.value.id, node.attr) in readers:
                        calls.add(str(path.relative_to(ROOT)))
                elif isinstance(node, ast.Name | ast.alias):
                    name = node.id if isinstance(node, ast.Name) else node.name
                    assert name not in ("safe_open", "load_file", "memmap"), path
    assert calls == {"mlx_smolvlm/checkpoint/headers.py"}


def test_few_frames_between_the_command_and_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At most five of our own functions lie between `main` and `Model.step`."""
    from mlx_smolvlm.cli import app
    from mlx_smolvlm.model.model import Model

    stacks, step = [], Model.step

    def record(*arguments: Any) -> Any:
        stacks.append(traceback.extract_stack())
        return step(*arguments)

    monkeypatch.setattr(Model, "step", record)
    picture = str(ROOT / "examples" / "three.png")
    monkeypatch.setattr(
        sys, "argv", ["mlx-smolvlm", "chat", "--image", picture, "What is it?", "--max-tokens", "3"]
    )
    with pytest.raises(SystemExit):
        app.main()
    assert capsys.readouterr().out.strip()
    known = {str(path.resolve()): name for name, path in modules().items()}
    own = [
        f"{known[str(path)]}.{frame.name}"
        for frame in stacks[0]
        if str(path := Path(frame.filename).resolve()) in known
    ]
    between = own[own.index("mlx_smolvlm.cli.app.main") + 1 :]
    assert 1 <= len(between) <= 5, between


def list_documents() -> list[Path]:
    """The Markdown files of the project."""
    folders = ("docs", "examples", "benchmarks", "train", "demo_recipe", "mlx_smolvlm/demo")
    return sorted(
        [*ROOT.glob("*.md"), *(path for name in folders for path in (ROOT / name).rglob("*.md"))]
    )


def make_anchors(path: Path) -> set[str]:
    """The anchors of the headings of a Markdown file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("path", list_documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_links_in_the_documents_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    folders = (*PACKAGE_FOLDERS, "tests", "benchmarks", "demo_recipe", "docs")
    files = [f"/{file.relative_to(ROOT)}" for name in folders for file in (ROOT / name).rglob("*")]
    for name in re.findall(r"`([\w./-]+\.(?:py|md|toml))`", text):
        is_known = (ROOT / name).exists() or any(file.endswith(f"/{name}") for file in files)
        is_elsewhere = name.startswith("mlx_lm/") or name == "photos.toml"  # a user's
        assert is_known or is_elsewhere, f"{name} does not exist"
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text):
        linked = path.parent / target if target else path
        assert linked.exists(), f"the link {target} leads nowhere"
        if anchor:
            assert anchor in make_anchors(linked), f"{target} has no heading #{anchor}"


def read_package_page(heading: str) -> str:
    """The section of Package.md under `heading`."""
    text = (ROOT / "Package.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_package_md_lists_every_file_in_its_folder() -> None:
    page = read_package_page("Folders").partition("### Outside of the package")[0]
    listed: dict[str, set[str]] = {}
    for first, rest in re.findall(r"^\| `([\w/.]+)` \|(.*)$", page, re.MULTILINE):
        is_folder = first.endswith("/")
        names = set(re.findall(r"`(\w+\.py)`", rest)) if is_folder else {first}
        listed.setdefault(first.rstrip("/") if is_folder else "mlx_smolvlm", set()).update(names)
    assert not listed.pop("demo")  # the checkpoint
    found: dict[str, set[str]] = {}
    paths = list_package_files()
    for path in paths:
        folder = str(path.parent.relative_to(ROOT)).removeprefix("mlx_smolvlm/")
        if path.name != "__init__.py" or folder == "mlx_smolvlm":
            found.setdefault(folder, set()).add(path.name)
    assert listed == found
    counts = len(paths), sum(path.name == "__init__.py" for path in paths)
    assert re.findall(r"has (\d+) Python files, of which (\d+)", page) == [
        tuple(str(count) for count in counts)
    ]


def test_package_md_prints_the_arrows_between_folders(arrows: dict[tuple[str, str], bool]) -> None:
    """The right text of the block stands in the message, to be pasted."""
    targets: dict[str, set[str]] = {name: set() for name in LAYERS if "__init__" not in name}
    for first, second in between_folders(arrows):
        targets.setdefault(first, set()).add(second)
    lines = [
        f"{name:16} -> {', '.join(sorted(targets[name], key=LAYERS.index)) or 'nothing'}"
        for name in LAYERS
        if "__init__" not in name
    ]
    block = read_package_page("Imports run one way").split("```")[1].strip()
    shown = re.sub(r",\n +", ", ", block)
    assert shown == "\n".join(lines), "\n".join(lines)
