import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_only_the_two_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rlqwen", "rlqwen_rewards"}


def test_the_wheel_carries_every_recipe(wheel: zipfile.ZipFile) -> None:
    carried = {Path(name).name for name in wheel.namelist() if name.startswith("rlqwen/_recipes/")}
    assert carried == {path.name for path in (ROOT / "recipes").glob("*.yaml")}


def test_names_of_the_house_are_importable_lazily() -> None:
    code = "import rlqwen, sys; assert 'torch' not in sys.modules; rlqwen.GRPOConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def pinned(lock: str) -> dict[str, str]:
    """Name -> version, of a lock file in requirements/."""
    lines = (ROOT / "requirements" / lock).read_text("utf-8").splitlines()
    pins = [line.split()[0].partition("==") for line in lines if re.match(r"[a-z0-9]", line)]
    names = [name for name, _, _ in pins]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return {name: version for name, _, version in pins}


def test_packages_that_carry_cudas_version_agree_on_it() -> None:
    """Their files lie in the same folders: cuda-python 12 and cuda-bindings 13 overwrite each other's."""
    pins = pinned("cuda.txt")
    family = {name: pins[name] for name in ("cuda-python", "cuda-bindings", "cuda-toolkit")}
    assert len({version.split(".")[0] for version in family.values()}) == 1, family
    assert family["cuda-python"].split(".")[:2] == family["cuda-bindings"].split(".")[:2], family
    # A wheel named for CUDA 12 beside its twin for 13; cutlass-dsl names its two backends so, in folders of their own.
    named = {name.rpartition("-cu1")[0] for name in pins if name.endswith("-cu12")}
    assert not {name for name in named if f"{name}-cu13" in pins} - {"nvidia-cutlass-dsl-libs"}


@pytest.mark.parametrize(("lock", "extra"), [("cpu.txt", "cpu"), ("cuda.txt", "cuda")])
def test_a_lock_has_what_the_project_asks_for(lock: str, extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"][extra]]
    pins = pinned(lock)
    if lock == "cpu.txt":
        pins["torch"] = "2.13.0"  # the CPU build, which the Makefile installs
    unmet = [f"{one}: {pins.get(one.name)}" for one in wanted if not one.specifier.contains(pins.get(one.name, "0"))]
    assert not unmet


def test_the_lock_of_the_documentation_has_what_its_group_asks_for() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    pins = pinned("docs.txt")
    assert all(one.specifier.contains(pins[one.name]) for one in map(Requirement, groups["docs"]))
