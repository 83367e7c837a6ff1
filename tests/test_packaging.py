"""What an installation holds, and what it costs to import."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flashmoe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_installs_a_package_named_core(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    packages = {t for t in top if not t.endswith(".dist-info")}
    assert packages == {"flashmoe", "llm_flashmoe", "langchain_flashmoe"}


@pytest.mark.parametrize(
    "name",
    [
        "flashmoe/ops/kernels.py",
        "flashmoe/demo/model.safetensors",
        "flashmoe/demo/README.md",
        "langchain_flashmoe/py.typed",
    ],
)
def test_wheel_lacks_a_file(wheel, name):
    assert name in wheel.namelist()


def test_wheel_lacks_its_entry_points(wheel):
    (points,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    text = wheel.read(points).decode()
    assert "flashmoe = llm_flashmoe" in text
    assert "flashmoe = flashmoe.cli:cli" in text


def test_versions_differ():
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', project, re.M)[1] == flashmoe.__version__


@pytest.mark.parametrize(
    "module",
    ["flashmoe", "flashmoe.engine", "flashmoe.cli", "llm_flashmoe", "langchain_flashmoe"],
)
def test_import_pulls_in_mlx(module):
    code = (
        f"import sys, {module}\n"
        "print(*({'mlx', 'mlx_lm', 'numba', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
