"""Make known mistakes in a copy of the sources, one at a time, and see that the tests notice.

    python -m tests.mutations [NAME...] [--jobs N] [--all-tests] [--list]

The mistakes are in tests/mutation_lists/*.toml. NAME is a mutation, a list (the stem of its
file) or a pattern such as "cache-*". Exits with 1 if a mutation survives or cannot be made.
See docs/decisions/mutations.md.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[1]
LISTS = Path(__file__).with_name("mutation_lists")
SOURCES = ("mlx_smolvlm", "bench", "convert", "documents", "cli", "train", "demo_recipe")
TIMEOUT_S = 300.0  # of the tests of one mutation
BASELINE_TIMEOUT_S = 3600.0


class StaleError(Exception):
    """A mutation cannot be made: its symbol, its text or one of its tests is gone."""


@dataclass(frozen=True)
class Mutation:
    """A mistake to make, and the tests that should notice it.

    Attributes:
        name: Unique over all lists.
        group: The list that it is in.
        mistake: What is wrong with the mutated program, a sentence.
        symbol: The function, class, method or module constant to change, by its qualified
            name (`KVCache.trim`). Where several that have the text are called so, with the end
            of the module's path: `cli/choose:choose`.
        old: Text that occurs exactly once in the symbol's source.
        new: What replaces it.
        tests: Names of test functions, `test_file.py::test_name` where several files have one
            of that name, or whole files.
    """

    name: str
    group: str
    mistake: str
    symbol: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_mutations(folder: Path = LISTS) -> list[Mutation]:
    """The mutations in the lists of `folder`.

    Raises:
        ValueError: Two have the same name, or a field is missing or unknown.
    """
    mutations: dict[str, Mutation] = {}
    for path in sorted(folder.glob("*.toml")):
        for name, values in tomllib.loads(path.read_text(encoding="utf-8")).items():
            if name in mutations:
                raise ValueError(f"{path.name}: {name} is in {mutations[name].group} too")
            try:
                fields = values | {"tests": tuple(values["tests"])}
                mutations[name] = Mutation(name, path.stem, **fields)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path.name}, {name}: {error}") from None
    return list(mutations.values())


@dataclass(frozen=True)
class Place:
    """The lines of a file that define a symbol, counted from 1, both included."""

    path: Path
    first: int
    last: int


class Sources:
    """The package's source files and the tests below `root`, read once."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._texts: dict[Path, str] = {}
        self._symbols: dict[str, list[Place]] = defaultdict(list)
        for name in SOURCES:
            for folder, _, files in os.walk(root / name):  # does not follow the links inside
                for file in sorted(one for one in files if one.endswith(".py")):
                    self._read(Path(folder, file))
        self._tests: dict[str, list[str]] = defaultdict(list)
        for path in sorted((root / "tests").rglob("test_*.py")):
            file = path.relative_to(root).as_posix()
            self._tests[path.name].append(file)
            for test in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M):
                self._tests[test].append(f"{file}::{test}")
                self._tests[f"{path.name}::{test}"].append(f"{file}::{test}")

    def _read(self, path: Path) -> None:
        text = self._texts[path] = path.read_text(encoding="utf-8")
        for name, node in _definitions(ast.parse(text).body, ""):
            decorators = getattr(node, "decorator_list", ())
            first = min([node.lineno, *(one.lineno for one in decorators)])
            self._symbols[name].append(Place(path, first, node.end_lineno or node.lineno))

    def find(self, mutation: Mutation) -> tuple[Place, str]:
        """The place that `mutation` changes, and the source there.

        Of several symbols of the same name, it is the one that has the text.

        Raises:
            StaleError: There is none, or more than one.
        """
        module, _, name = mutation.symbol.rpartition(":")
        sources = {
            place: "\n".join(self._lines(place))
            for place in self._symbols.get(name, ())
            if place.path.with_suffix("").as_posix().endswith(f"/{module}" if module else "")
        }
        if not sources:
            raise StaleError(f"there is no {mutation.symbol}")
        found = [one for one in sources.items() if one[1].count(mutation.old) == 1]
        if len(found) == 1:
            return found[0]
        if found:
            files = ", ".join(str(place.path.relative_to(self._root)) for place, _ in found)
            raise StaleError(f"{name} is defined in {files}: write path:{name}")
        counts = ", ".join(str(source.count(mutation.old)) for source in sources.values())
        raise StaleError(f"{mutation.symbol} has {mutation.old!r} {counts} times")

    def _lines(self, place: Place) -> list[str]:
        return self._texts[place.path].split("\n")[place.first - 1 : place.last]

    def mutate(self, mutation: Mutation) -> tuple[Path, str]:
        """The file that `mutation` changes, below the root, and its new text.

        Raises:
            StaleError: Its text is not found once, or the result does not compile.
        """
        place, source = self.find(mutation)
        changed = source.replace(mutation.old, mutation.new)
        try:
            compile(f"if True:\n{changed}" if changed[0] == " " else changed, "mutated", "exec")
        except SyntaxError as error:
            raise StaleError(f"it does not compile: {error}") from None
        lines = self._texts[place.path].split("\n")
        text = "\n".join([*lines[: place.first - 1], changed, *lines[place.last :]])
        return place.path.relative_to(self._root), text

    def node_ids(self, mutation: Mutation) -> tuple[str, ...]:
        """What pytest calls the tests of `mutation`.

        Raises:
            StaleError: A test does not exist, or is in several files.
        """
        result = []
        for test in mutation.tests:
            found = self._tests.get(test, [])
            if len(found) != 1:
                raise StaleError(f"{test} is in {', '.join(found) or 'no file'}")
            result += found
        if not result:
            raise StaleError("it names no tests")
        return tuple(result)


def _definitions(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.stmt]]:
    """Qualified names of what the statements of `body` define, and where."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name, node
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not prefix:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((one.id, node) for one in targets if isinstance(one, ast.Name))


@dataclass(frozen=True)
class Run:
    """What became of some tests; `seconds` is None if they were stopped by the time limit."""

    status: int
    passed: tuple[str, ...]
    failed: tuple[str, ...]
    seconds: float | None
    output: str


class Copy:
    """A copy of the files that git knows of, in which tests can be run."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            if os.path.lexists(root / name):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, target, follow_symlinks=False)
        for name in SOURCES:
            compileall.compile_dir(str(folder / name), quiet=2)

    @contextlib.contextmanager
    def changed(self, path: Path, text: str) -> Iterator[None]:
        """Within the block, the file at `path` holds `text`."""
        file = self._folder / path
        original, time_ns = file.read_bytes(), file.stat().st_mtime_ns
        try:
            file.write_text(text, encoding="utf-8")
            os.utime(file, ns=(time_ns, time_ns + 10**10))  # the compiled file is of another time
            yield
        finally:
            file.write_bytes(original)
            os.utime(file, ns=(time_ns, time_ns))

    def test(self, node_ids: Sequence[str], options: Sequence[str], timeout_s: float) -> Run:
        """Run the tests at `node_ids`, which write no compiled files."""
        report = self._folder / ".mutation-report.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-o", "junit_family=xunit1", f"--junitxml={report}", *options]
        environment = {"PYTHONPATH": str(self._folder), "PYTHONDONTWRITEBYTECODE": "1"}
        started = time.monotonic()
        with tempfile.TemporaryFile() as output:  # a pipe would wait for every process that has it
            self._process = subprocess.Popen(
                [*command, *dict.fromkeys(node_ids)],
                cwd=self._folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            seconds: float | None = None
            try:
                self._process.wait(timeout_s)
                seconds = time.monotonic() - started
            except subprocess.TimeoutExpired:
                self.kill()
                self._process.wait()
            output.seek(0)
            text = output.read().decode(errors="replace")
        passed, failed = _read_report(report) if report.exists() else ((), ())
        return Run(self._process.returncode, passed, failed, seconds, text)

    def kill(self) -> None:
        """End the tests that run, with the processes that they have started."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _read_report(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the tests that passed and that failed, without parameters, each once."""
    passed, failed = dict[str, None](), dict[str, None]()
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        node_id = f"{case.get('file')}::{name}" if case.get("file") else name
        if case.find("failure") is not None or case.find("error") is not None:
            failed[node_id] = None
        elif case.find("skipped") is None:
            passed[node_id] = None
    return tuple(passed), tuple(failed)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutation: "caught", or in capitals what is wrong, and the reason."""

    mutation: Mutation
    result: str
    reason: str
    seconds: float = 0.0

    def row(self) -> str:
        """A row of the table."""
        one = self.mutation
        return (
            f"| {one.group} | {one.name}: {one.mistake} | {self.result} | {self.reason} "
            f"| {self.seconds:.0f} |"
        )


class Hunt:
    """A run over mutations; `folder` is where the copies go, `options` are pytest's."""

    def __init__(
        self, root: Path, folder: Path, jobs: int = 1, options: Sequence[str] = ("-x",)
    ) -> None:
        self._sources, self._jobs, self._options = Sources(root), jobs, tuple(options)
        self._copies = [Copy(root, folder / str(number)) for number in range(jobs)]
        self._free: queue.SimpleQueue[Copy] = queue.SimpleQueue()

    def run(self, mutations: Sequence[Mutation]) -> Iterator[Verdict]:
        """Try `mutations`, each as soon as it is decided; first whether they can be tried."""
        ready: dict[str, tuple[Mutation, tuple[str, ...]]] = {}
        for mutation in mutations:
            try:
                self._sources.mutate(mutation)
                ready[mutation.name] = mutation, self._sources.node_ids(mutation)
            except StaleError as error:
                yield Verdict(mutation, "STALE", str(error))
        if not ready:
            return
        baseline = self._baseline([one for _, node_ids in ready.values() for one in node_ids])
        for copy in self._copies:
            self._free.put(copy)
        pool = ThreadPoolExecutor(self._jobs)
        try:
            tasks = []
            for mutation, node_ids in ready.values():
                if fault := _fault(node_ids, baseline):
                    yield Verdict(mutation, "BROKEN", fault)
                else:
                    tasks.append(pool.submit(self._try, mutation, node_ids))
            for task in as_completed(tasks):
                yield task.result()
        finally:  # after Ctrl-C too
            for copy in self._copies:
                copy.kill()
            pool.shutdown(cancel_futures=True)

    def _baseline(self, node_ids: Sequence[str]) -> Run:
        """The tests at `node_ids` with nothing changed."""
        options = ["-n", str(self._jobs)] if self._jobs > 1 else []
        run = self._copies[0].test(node_ids, options, BASELINE_TIMEOUT_S)
        if run.status not in (0, 1) or run.seconds is None:
            raise SystemExit(f"the tests do not run unmutated:\n{run.output[-3000:]}")
        return run

    def _try(self, mutation: Mutation, node_ids: Sequence[str]) -> Verdict:
        """Make the mistake, and run its tests."""
        copy = self._free.get()
        try:
            with copy.changed(*self._sources.mutate(mutation)):
                run = copy.test(node_ids, self._options, TIMEOUT_S)
        finally:
            self._free.put(copy)
        if run.seconds is None:
            return Verdict(mutation, "caught", "by the time limit", TIMEOUT_S)
        names = ", ".join(f"`{one.rpartition('::')[2]}`" for one in run.failed)
        if run.status in (1, 2) and names:
            return Verdict(mutation, "caught", names, run.seconds)
        if run.status == 0:
            return Verdict(mutation, "SURVIVED", ", ".join(mutation.tests), run.seconds)
        if run.status < 0:
            return Verdict(mutation, "caught", f"by signal {-run.status}", run.seconds)
        return Verdict(mutation, "BROKEN", f"pytest exits with {run.status}", run.seconds)


def _fault(node_ids: Sequence[str], baseline: Run) -> str | None:
    """Why the tests at `node_ids` cannot tell anything; None if they can."""

    def those(names: Sequence[str]) -> list[str]:
        return [name for name in names if {name, name.partition("::")[0]} & {*node_ids}]

    if failed := those(baseline.failed):
        return f"fails unmutated: {', '.join(failed)}"
    return None if those(baseline.passed) else "all of its tests are skipped here"


def choose(mutations: Sequence[Mutation], names: Sequence[str]) -> list[Mutation]:
    """Those of `mutations` that `names` mean; all without names.

    Raises:
        SystemExit: A name means none of them.
    """
    chosen: Mapping[str, Mutation] = {} if names else {one.name: one for one in mutations}
    for name in names:
        found = [one for one in mutations if one.group == name or fnmatchcase(one.name, name)]
        if not found:
            raise SystemExit(f"there is no mutation and no list called {name}")
        chosen = {**chosen, **{one.name: one for one in found}}
    return list(chosen.values())


def main() -> None:
    """Print a row for each mutation, then the figure; exit with 1 if one is not caught."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutation, list or pattern")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies to work in")
    parser.add_argument(
        "--all-tests", action="store_true", help="go on after the first test that fails"
    )
    parser.add_argument("--list", action="store_true", help="print the mutations, run nothing")
    arguments = parser.parse_args()
    # A shell starts background jobs with Ctrl-C ignored, which the tests would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mutations = choose(read_mutations(), arguments.names)
    if arguments.list:
        for one in mutations:
            print(f"{one.group:12} {one.name:44} {one.symbol}: {one.mistake}")
        return
    caught = 0
    print("| list | mistake | result | tests that fail | s |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        options = () if arguments.all_tests else ("-x",)
        for verdict in Hunt(ROOT, Path(folder), max(1, arguments.jobs), options).run(mutations):
            caught += verdict.result == "caught"
            print(verdict.row(), flush=True)
    print(f"\n{caught} of {len(mutations)} caught")
    raise SystemExit(caught < len(mutations))


if __name__ == "__main__":
    main()
