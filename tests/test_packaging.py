"""The Homebrew formula installs this version with the packages that it needs, and nothing else."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FORMULA = ROOT / "packaging" / "mlx-smolvlm.rb"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# As much of Homebrew as the formula uses: it prints what the formula says, and what it would do.
HOMEBREW = r"""
require "pathname"
class Folder < Pathname
  def /(other)
    Folder.new(File.join(to_s, other))
  end
  def install(files)
    puts "install " + files.sort.join(" ")
  end
  def write(text)
    puts "write #{self}", text
  end
end
class Formula
  %w[desc homepage url version license depends_on].each do |name|
    define_singleton_method(name) do |*values|
      puts "#{name} #{values.map { |value| value.inspect }.join(", ")}"
    end
  end
  def self.test; end
  def self.[](name)
    Struct.new(:opt_bin).new(Folder.new("/opt/#{name}/bin"))
  end
  def libexec
    Folder.new("/cellar/libexec")
  end
  def bin
    Folder.new("/cellar/bin")
  end
  def system(*words)
    puts "run " + words.join(" ")
  end
end
load ARGV[0]
MlxSmolvlm.new.install
MlxSmolvlm.new.post_install
"""


def read_locked() -> dict[str, str]:
    """Name and version of each package that the formula installs."""
    text = (ROOT / "packaging" / "requirements-macos.txt").read_text()
    blocks = re.findall(
        r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n)+)", text, re.M
    )
    assert len(blocks) == len(re.findall("^[a-z]", text, re.M))  # each has a checksum
    return {canonicalize_name(name): version for name, version, _ in blocks}


def test_the_formula_states_the_version_the_licence_and_the_python_of_the_project() -> None:
    text = FORMULA.read_text()
    assert re.findall(r'^  version "(.+)"$', text, re.M) == [PROJECT["version"]]
    assert re.findall(r'^  license "(.+)"$', text, re.M) == [PROJECT["license"]]
    assert re.findall(r'^  desc "(.+)"$', text, re.M) == [PROJECT["description"]]
    versions = re.findall(r"python@?([\d.]+)", text)
    assert versions
    assert set(versions) == {"3.13"}
    assert "3.13" in SpecifierSet(PROJECT["requires-python"])


def test_the_formula_installs_every_dependency_in_a_version_that_fits() -> None:
    locked = read_locked()
    mac = {**default_environment(), "sys_platform": "darwin", "platform_machine": "arm64"}
    wanted = map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["json"])
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate(mac)]
    assert len(needed) >= 12
    for one in needed:
        version = locked.get(canonicalize_name(one.name))
        assert version, f"{one.name} is missing: run `make formula`"
        assert version in one.specifier, f"{one.name} {version}: run `make formula`"
    assert "cmeel-openblas" not in locked  # for Linux
    assert "torch" not in locked


def test_ruby_reads_the_formula(tmp_path: Path) -> None:
    if shutil.which("ruby") is None:
        assert "REQUIRE_PROGRAMS" not in os.environ, "install ruby"  # as .ci/run does
        pytest.skip("ruby is not installed")
    (tmp_path / "homebrew.rb").write_text(HOMEBREW)
    done = subprocess.run(
        ["ruby", tmp_path / "homebrew.rb", FORMULA], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f'url "file://{ROOT}", ' in done.stdout
    assert any(line.startswith("install ") and " pyproject.toml " in line for line in lines)
    runs = [line for line in lines if line.startswith("run ")]
    assert runs[0] == "run /opt/python@3.13/bin/python3.13 -m venv /cellar/libexec/venv"
    assert (
        "--require-hashes --requirement /cellar/libexec/packaging/requirements-macos.txt" in runs[1]
    )
    assert runs[2].endswith("--no-deps /cellar/libexec")
