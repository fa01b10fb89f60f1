"""One source of truth for the environment: pyproject, the two locks, environment.yml and the CI file agree."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import effnn
from effnn import paths

LOCK, CCL_LOCK = paths.HOME / "requirements.lock", paths.HOME / "requirements-ccl.lock"
PROJECT = tomllib.loads((paths.HOME / "pyproject.toml").read_text(encoding="utf-8"))
CONDA = yaml.safe_load((paths.HOME / "environment.yml").read_text(encoding="utf-8"))
CI = (paths.HOME / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def pins(path):
    """Requirements of a lock, in order; every line is an exact pin."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+( ; .+)?", line), f"{path.name}: {line} is no exact pin"
    return [Requirement(line) for line in lines]


def versions(path):
    return {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in pins(path)}


def ranges():
    """name -> specifier of every direct dependency, those of the extras too."""
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["ccl"]]
    return {canonicalize_name(item.name): item.specifier for item in map(Requirement, wanted)}


@pytest.mark.parametrize("lock", [LOCK, CCL_LOCK], ids=lambda path: path.name)
def test_a_lock_is_sorted_and_names_a_package_once(lock):
    names = [canonicalize_name(pin.name) for pin in pins(lock)]
    assert names == sorted(set(names))


def test_torch_is_pinned_without_a_local_version():
    assert "torch==2.13.0" in LOCK.read_text(encoding="utf-8").splitlines()
    assert not re.search(r"==\S*\+", LOCK.read_text(encoding="utf-8") + CCL_LOCK.read_text(encoding="utf-8"))


def test_every_range_has_an_upper_or_lower_end_and_admits_the_pin():
    locked = versions(LOCK) | versions(CCL_LOCK)
    for name, specifier in ranges().items():
        assert str(specifier), f"{name} has no range"
        assert name in locked, f"{name} is in pyproject.toml but in no lock"
        assert locked[name] in specifier, f"{name} {locked[name]} is outside {specifier}"


def test_oneccl_is_locked_for_linux_on_x86_64_alone():
    wanted = Marker("platform_system == 'Linux' and platform_machine == 'x86_64'")
    assert all(pin.marker == wanted for pin in pins(CCL_LOCK))
    assert not any(pin.marker for pin in pins(LOCK))
    extra = [Requirement(text) for text in PROJECT["project"]["optional-dependencies"]["ccl"]]
    assert all(item.marker == wanted for item in extra)
    assert {canonicalize_name(item.name) for item in extra} <= set(versions(CCL_LOCK))
    assert not set(versions(LOCK)) & set(versions(CCL_LOCK))


def test_the_locks_hold_everything_that_their_packages_pull():
    """An unpinned package would be whatever is newest on the day of the installation."""
    locked = set(versions(LOCK)) | set(versions(CCL_LOCK))
    from_the_cuda_build = re.compile(r"nvidia-|cuda-|triton$")
    for pin in pins(LOCK) + pins(CCL_LOCK):
        if pin.marker is not None and not pin.marker.evaluate():
            continue  # oneCCL where it cannot be installed
        name = pin.name
        try:
            wanted = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            pytest.fail(f"{name} is locked but not installed")
        for item in wanted:
            applies = item.marker is None or item.marker.evaluate({"extra": ""})
            pulled = canonicalize_name(item.name)
            assert not applies or pulled in locked or from_the_cuda_build.match(pulled), f"{name} pulls {pulled}"


def test_every_pinned_package_runs_on_the_oldest_supported_python():
    oldest = Version("3.11.0")
    assert oldest in SpecifierSet(PROJECT["project"]["requires-python"])
    for pin in pins(LOCK) + pins(CCL_LOCK):
        if pin.marker is None or pin.marker.evaluate():
            wanted = importlib.metadata.metadata(pin.name)["Requires-Python"] or ""
            assert oldest in SpecifierSet(wanted), f"{pin} wants Python {wanted}"


def test_conda_and_binder_get_the_same_pins():
    pip = next(item["pip"] for item in CONDA["dependencies"] if isinstance(item, dict))
    assert pip == ["--extra-index-url https://download.pytorch.org/whl/cpu", "-r requirements.lock", "-e ."]
    plain = [item for item in CONDA["dependencies"] if isinstance(item, str)]
    assert plain == ["python=3.11", "pip"], "a package that conda installs would escape the lock"


def test_the_python_versions_agree():
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    assert "3.11" in supported and "3.10" not in supported
    assert 'python-version: "3.11"' in CI
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert "Python 3.11 or newer" in (paths.HOME / "Makefile").read_text(encoding="utf-8")


def test_the_ci_runs_the_test_command_of_the_readme_and_nothing_else():
    script = paths.HOME / ".ci/run"
    assert script.read_text(encoding="utf-8").split("\n", 1)[1].strip() == 'cd "$(dirname "$0")/.." && exec make test'
    assert script.stat().st_mode & 0o111
    steps = next(iter(yaml.safe_load(CI)["jobs"].values()))["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]


def test_no_index_is_named_but_pytorchs():
    for name in ("pyproject.toml", "requirements.lock", "requirements-ccl.lock", "environment.yml", "Makefile"):
        hosts = re.findall(r"[a-z+]+://([^/\s'\"]+)", (paths.HOME / name).read_text(encoding="utf-8"))
        assert set(hosts) <= {"download.pytorch.org"}, name


def test_the_package_says_one_version():
    assert PROJECT["project"]["version"] == effnn.__version__
    citation = yaml.safe_load((paths.HOME / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == effnn.__version__ and citation["license"] == PROJECT["project"]["license"]


@pytest.mark.skipif(Path(sys.prefix) != paths.HOME / ".venv", reason="this is not the environment that make env makes")
def test_what_is_installed_is_what_is_locked():
    here = [pin for pin in pins(LOCK) + pins(CCL_LOCK) if pin.marker is None or pin.marker.evaluate()]
    installed = {pin.name: importlib.metadata.version(pin.name) for pin in here}
    assert [name for name, version in installed.items() if Version(version) not in SpecifierSet(_pin(here, name))] == []


def _pin(requirements, name):
    return str(next(item.specifier for item in requirements if item.name == name))
