"""Measure what the package and each of its dependencies take on the disk, on Linux and on a Mac.

    python -m benchmarks.installed_size [--also NAME]... [--json FILE]

Installs this checkout into a new environment, and the wheels of a Mac with Apple silicon into a
folder, without using them. Both have compiled bytecode, as pip leaves it. A dependency "with its
own" counts what nothing else needs too. NAME is a distribution to measure besides, such as a
former dependency. Downloads about 300 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = "mlx-smolvlm"
INSTALLER = {"pip", "setuptools"}  # in every environment
MAC_TAG = "macosx_14_0_arm64"
MAC = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}

Needs = dict[str, set[str]]
"""The distributions that each one requires, by normalized names."""


def run(*command: object) -> None:
    """Run `command` quietly.

    Raises:
        SystemExit: It failed; the message holds the end of its stderr.
    """
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{command[0]} failed: {result.stderr.strip()[-2000:]}")


def pip_install(*options: object, python: object = sys.executable) -> None:
    """Install with pip."""
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options)


def find_required(
    distribution: Distribution, extras: Iterable[str], environment: Mapping[str, str]
) -> dict[str, set[str]]:
    """Return the names that `distribution` requires, each with the extras it is required with."""
    needed: dict[str, set[str]] = {}
    for text in distribution.requires or ():
        requirement = Requirement(text)
        applies = requirement.marker is None or any(
            requirement.marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)
        )
        if applies:
            name = canonicalize_name(requirement.name)
            needed.setdefault(name, set()).update(requirement.extras)
    return needed


def find_needs(
    found: Mapping[str, Distribution], start: str, environment: Mapping[str, str]
) -> Needs:
    """Return what `start` and the distributions under it require, as far as they are in `found`."""
    needs: Needs = {}
    waiting = [(start, frozenset[str]())]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        required = find_required(found[name], extras, environment) if name in found else {}
        needs.setdefault(name, set()).update(required)
        waiting += [(other, frozenset(some)) for other, some in required.items()]
    return needs


def read_distributions(folder: Path) -> dict[str, Distribution]:
    """Return the distributions in a site-packages folder by normalized name."""
    found = distributions(path=[str(folder)])
    return {canonicalize_name(one.metadata["Name"]): one for one in found}


def measure(distribution: Distribution) -> int:
    """Return the bytes of the installed files of `distribution`."""
    paths = {Path(str(file.locate())).resolve() for file in distribution.files or ()}
    return sum(path.stat().st_size for path in paths if path.is_file())


def install_here(folder: Path, also: list[str]) -> tuple[Needs, dict[str, int], Distribution]:
    """Install the checkout into a new environment.

    Returns:
        What needs what, the sizes in bytes, and the package itself.
    """
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    pip_install(ROOT, *also, python=python)
    found = read_distributions(next(folder.glob("lib/python*/site-packages")))
    sizes = {name: measure(one) for name, one in found.items() if name not in INSTALLER}
    needs: Needs = {}
    for start in (PACKAGE, *also):
        needs |= find_needs(found, canonicalize_name(start), {})
    return needs, sizes, found[PACKAGE]


def install_for_mac(
    folder: Path, package: Distribution, also: list[str]
) -> tuple[Needs, dict[str, int]]:
    """Unpack the wheels of a Mac, and return what needs what, and the sizes in bytes.

    pip would decide by this machine which distributions are needed, so it installs one
    level of requirements at a time, each into a folder of its own: it leaves out a
    distribution whose folder exists, and mlx and mlx-metal share one.
    """
    found = {PACKAGE: package}
    tried = {PACKAGE}
    needs: Needs = {}
    while True:
        for start in (PACKAGE, *also):
            needs |= find_needs(found, canonicalize_name(start), MAC)
        missing = sorted(set(needs) - tried)
        if not missing:
            break
        tried |= set(missing)
        platform = ("--platform", MAC_TAG, "--only-binary=:all:", "--no-deps")
        level = folder / str(len(tried))
        pip_install(*platform, "--target", level, *missing)
        found |= read_distributions(level)
    return needs, {name: measure(one) for name, one in found.items()}


def find_closure(needs: Needs, start: str, without: str | None = None) -> set[str]:
    """Return `start` and all that it needs, directly or not, if `without` did not exist."""
    reached, waiting = set[str](), [start]
    while waiting:
        name = waiting.pop()
        if name != without and name not in reached:
            reached.add(name)
            waiting += needs.get(name, ())
    return reached


def tabulate(needs: Needs, sizes: Mapping[str, int], also: list[str]) -> dict[str, tuple[int, int]]:
    """Return the bytes of each direct dependency, alone and with what nothing else needs."""
    whole = find_closure(needs, PACKAGE)
    rows = {PACKAGE: (sizes[PACKAGE], sizes[PACKAGE])}
    for name in sorted(needs[PACKAGE]):
        own = whole - find_closure(needs, PACKAGE, without=name)
        rows[name] = (sizes[name], sum(sizes[other] for other in own))
    shared = whole - {PACKAGE, *needs[PACKAGE]}
    for name in needs[PACKAGE]:
        shared -= whole - find_closure(needs, PACKAGE, without=name)
    rows["shared by several"] = (0, sum(sizes[name] for name in shared))
    rows["all"] = (0, sum(sizes[name] for name in whole))
    for name in map(canonicalize_name, also):
        rows[f"besides: {name}"] = (
            sizes[name],
            sum(sizes[other] for other in find_closure(needs, name) - whole),
        )
    return rows


def main() -> None:
    """Install, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--also", action="append", default=[], help="measure this one besides")
    parser.add_argument("--json", type=Path, help="write the sizes of all distributions here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        needs, sizes, package = install_here(Path(name) / "here", arguments.also)
        mac_needs, mac_sizes = install_for_mac(Path(name) / "mac", package, arguments.also)
    here = tabulate(needs, sizes, arguments.also)
    mac = tabulate(mac_needs, mac_sizes, arguments.also)
    print("| MB | here | with its own | Mac | with its own |\n|---|---|---|---|---|")
    names = [*(here | mac)]
    names.sort(key=lambda name: -max(rows.get(name, (0, 0))[1] for rows in (here, mac)))
    for name in names:
        cells = [
            f"{size / 1e6:.1f}" if size else ""
            for rows in (here, mac)
            for size in rows.get(name, (0, 0))
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    if arguments.json:
        report = {"here": sizes, "mac": mac_sizes}
        arguments.json.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
