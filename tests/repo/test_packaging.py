"""Tests the contents of the wheel, and what importing the packages loads."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flashmoe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of this checkout, newly built."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_installs_only_the_four_packages(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    packages = {t for t in top if not t.endswith(".dist-info")}
    assert packages == {"flashmoe", "flashmoe_metal", "llm_flashmoe", "langchain_flashmoe"}


@pytest.mark.parametrize(
    "name",
    [
        "flashmoe/ops/cpu/matvec.py",
        "flashmoe/demo/model.safetensors",
        "flashmoe/demo/README.md",
        "flashmoe/hub/known_models.json",
        "flashmoe/plan/machines.json",
        "flashmoe/plan/routing.json",
        "flashmoe/sweep/pass_rates.json",
        "langchain_flashmoe/py.typed",
    ],
)
def test_wheel_contains_file(wheel, name):
    assert name in wheel.namelist()


def test_wheel_contains_the_texts_of_the_kernels(wheel, tmp_path):
    here = ROOT / "metal/flashmoe_metal"
    files = [p for p in here.rglob("*") if p.suffix in (".metal", ".h")]
    names = sorted(p.relative_to(here).as_posix() for p in files)
    assert "kernels/router.metal" in names
    assert "headers/cuda.h" in names
    wheel.extractall(tmp_path)
    code = (
        "import flashmoe_metal, sys\n"
        "from importlib.resources import files\n"
        "print(flashmoe_metal.__file__)\n"
        "for name in sys.argv[1:]:\n"
        "    print(len(files('flashmoe_metal').joinpath(name).read_bytes()))"
    )
    # Isolated like an installation: nothing of the checkout is in the path.
    command = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\n{code}",
    ]
    done = subprocess.run([*command, *names], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, *sizes = done.stdout.split("\n")[:-1]
    assert path == str(tmp_path / "flashmoe_metal/__init__.py")
    assert list(map(int, sizes)) == [(here / name).stat().st_size for name in names]


def test_wheel_declares_its_entry_points(wheel):
    (points,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    text = wheel.read(points).decode()
    assert "flashmoe = llm_flashmoe" in text
    assert "flashmoe = flashmoe.cli:cli" in text


def test_package_has_the_version_of_pyproject():
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', project, re.M)[1] == flashmoe.__version__


@pytest.mark.parametrize(
    "module",
    [
        *("flashmoe", "flashmoe.engine", "flashmoe.cli"),
        *("flashmoe_metal", "llm_flashmoe", "langchain_flashmoe"),
    ],
)
def test_import_loads_no_heavy_package(module):
    code = (
        f"import sys, {module}\n"
        "heavy = {'mlx', 'mlx_lm', 'numba', 'transformers', 'huggingface_hub'}\n"
        "print(*(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
