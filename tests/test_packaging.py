import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_only_the_two_packages(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rlqwen", "rlqwen_rewards"}


def test_the_wheel_carries_every_recipe(wheel):
    carried = {Path(name).name for name in wheel.namelist() if name.startswith("rlqwen/_recipes/")}
    assert carried == {path.name for path in (ROOT / "recipes").glob("*.yaml")}


def test_names_of_the_house_are_importable_lazily():
    code = "import rlqwen, sys; assert 'torch' not in sys.modules; rlqwen.GRPOConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
