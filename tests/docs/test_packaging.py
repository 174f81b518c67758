"""The wheel: complete, installable where nothing of the source tree is, and usable from there."""

from __future__ import annotations

import email
import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from builders import labelled_rows, write_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is written into the tree and no old build helps it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=leave_out)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "hasten").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "hasten/py.typed" in tracked and "hasten/__main__.py" in tracked
    assert names == tracked


def test_the_wheel_says_what_pyproject_says(wheel: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wheel.name == f"hasten-{project['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist()
                 if ".dist-info/" in name}  # fmt: skip
    about = email.message_from_string(texts["METADATA"])
    assert about["Version"] == project["version"] and about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    needed = [n for n in about.get_all("Requires-Dist", []) if "extra ==" not in n]
    assert sorted(needed) == sorted(project["dependencies"])
    assert "hasten = hasten.__main__:main" in texts["entry_points.txt"]
    assert "Apache License" in texts["LICENSE"]
    if (ROOT / "README.md").exists():
        assert about.get_payload().strip() == (ROOT / "README.md").read_text().strip()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; the dependencies are those that are here already."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    done = subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--no-index", wheel], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python3*/site-packages")
    # A path alone: what .pth files in that folder add, the source tree among it, is not read.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def run(*command: object, cwd: Path, seconds: float = 120) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_works_from_another_folder(installed: Path, own_cache: Path, tmp_path: Path):
    where = run(installed, "-c", "import hasten; print(hasten.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    version = run(installed, "-m", "hasten", "--version", cwd=tmp_path)
    assert version == run(installed.with_name("hasten"), "--version", cwd=tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version.strip() == project["version"]
    write_rows(tmp_path / "train.csv", labelled_rows(60), ("text", "label"))
    tiny = ["--model.num_layers", "1", "--model.hidden_size", "16", "--model.num_heads", "2"]
    out = run(installed, "-m", "hasten", "train", "train.csv", *tiny, "--epochs", "1", cwd=tmp_path)
    assert "run folder: runs/train-1" in out
    out = run(installed.with_name("hasten"), "predict", "runs/train-1", "an owl", cwd=tmp_path)
    assert out.split("\t")[0] in ("bird", "fruit", "tool") and out.endswith("\tan owl\n")


def test_the_demo_of_the_wheel(installed: Path, own_cache: Path, tmp_path: Path):
    """As it is: there is no shorter one."""
    out = run(installed.with_name("hasten"), "demo", "--quiet", cwd=tmp_path, seconds=900)
    assert out.startswith("data: ") and "\nsome of the test set:\n" in out
    folder = tmp_path / "runs" / "demo-1"
    assert folder.with_name("demo-1-data").is_dir()
    assert {path.name for path in (folder / "model").iterdir()} >= {"config.json", "tokenizer.json"}
    found = json.loads((folder / "result.json").read_text())
    assert found["test"]["accuracy"] > found["baselines"]["majority"]["accuracy"]
    assert f"\ntest: accuracy {found['test']['accuracy']:.4f} " in out
