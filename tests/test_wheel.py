"""Contents of the wheel, and its use without the repository."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import conceptseg_hf
from conceptseg_hf.shipped import find_shipped_folder

ROOT = Path(conceptseg_hf.__file__).resolve().parents[1]

# Folders of the repository and their locations in the wheel.
FOLDERS = {
    "conceptseg_hf": "conceptseg_hf",
    "trainers/conceptseg_trainers": "conceptseg_trainers",
    "trainers/recipes": "conceptseg_trainers/recipes",
    "trainers/accelerate_configs": "conceptseg_trainers/accelerate_configs",
    "fiftyone_plugin": "conceptseg_hf/fiftyone_plugin",
    "examples": "conceptseg_hf/examples",
}

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(),
    reason="the package is installed without the repository",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        str(folder),
    ]
    has_hatchling = importlib.util.find_spec("hatchling") is not None
    done = subprocess.run(
        [*command, *(["--no-build-isolation"] if has_hatchling else [])], capture_output=True, text=True
    )
    if done.returncode and not has_hatchling:
        pytest.skip("hatchling is not installed and cannot be downloaded")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("conceptseg_hf-*.whl")
    return path


def test_wheel_contains_all_shipped_files(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    launcher = {"conceptseg_hf/cli/launcher.py"}  # installed as conceptseg_launcher.py
    assert sorted(names) == sorted(expected - launcher | {"conceptseg_launcher.py"})
    for name in (
        "conceptseg_trainers/recipes/nano_sft.yaml",
        "conceptseg_trainers/accelerate_configs/zero3.yaml",
        "conceptseg_hf/fiftyone_plugin/fiftyone.yml",
        "conceptseg_hf/examples/segment_image.py",
        "conceptseg_hf/checkpoints/nano/model.safetensors",
    ):
        assert name in names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a command in a fresh environment with the wheel and the libraries of this environment."""
    folder = tmp_path_factory.mktemp("fresh")
    python = folder / "bin" / "python"
    if os.name == "nt":
        pytest.skip("virtual environments have another layout on Windows")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    # .pth files in folders of PYTHONPATH are ignored, so an editable install is not found
    libraries = sysconfig.get_path("purelib")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))},
        "PYTHONPATH": libraries,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [str(folder / "bin" / arguments[0]), *arguments[1:]]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.heavy
def test_installed_recipe_can_be_trained_by_name(installed):
    pytest.importorskip("trl")
    options = ["--output_dir", "run", "--max_steps", "1", "--train_samples", "4", "--eval_strategy", "no"]
    options += ["--per_device_train_batch_size", "2"]
    done = installed("conceptseg", "train", "sft", "--config", "nano_sft", *options)
    assert done.returncode == 0, done.stderr
    assert "'run'" in done.stdout
    misspelled = installed("conceptseg", "train", "sft", "--config", "nano-sft")
    assert misspelled.returncode == 2 and "(did you mean 'nano_sft'?)" in misspelled.stderr


def test_installed_info_lists_the_shipped_folders(installed):
    done = installed("conceptseg", "info")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines() if not line.startswith(" "))
    for what, name in {
        "recipes": "conceptseg_trainers/recipes",
        "launch files": "conceptseg_trainers/accelerate_configs",
        "FiftyOne plugin": "conceptseg_hf/fiftyone_plugin",
        "examples": "conceptseg_hf/examples",
    }.items():
        folder = Path(rows[what].strip())
        assert folder.is_dir() and folder.as_posix().endswith(f"site-packages/{name}")


def test_installed_app_finds_its_plugin(installed):
    pytest.importorskip("fiftyone")
    done = installed("python", "-m", "conceptseg_hf.integrations.fiftyone_app", "--samples", "0")
    assert done.returncode == 2 and "--samples is 0" in done.stderr
    code = "from conceptseg_hf.integrations.fiftyone_app.app import _PLUGIN as plugin; "
    code += "print((plugin / 'fiftyone.yml').is_file())"
    assert installed("python", "-c", code).stdout == "True\n"


def test_shipped_folders_in_the_repository():
    for place in (("recipes", "conceptseg_trainers"), ("accelerate_configs", "conceptseg_trainers")):
        assert find_shipped_folder(*place) == ROOT / "trainers" / place[0]
    assert find_shipped_folder("examples") == ROOT / "examples"
    assert find_shipped_folder("recipes", "no_such_package") is None
