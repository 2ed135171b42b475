"""The wheel with its extras in a fresh environment, from a package index.

`test_wheel.py` tests the contents of the wheel without an index.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import conceptseg_hf

ROOT = Path(conceptseg_hf.__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Extras that are not installed with the others, and why.
APART = {
    "sam3": "Meta's package requires older releases; see pyproject.toml",
    "parity": "packages of the tests",
    "test": "packages of the tests",
    "dev": "packages of the developers",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.heavy,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="there is no repository"),
    pytest.mark.skipif(os.name == "nt", reason="virtual environments have another layout on Windows"),
]


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def pip(tmp_path_factory) -> list[str]:
    """Return the command of pip in a fresh environment; skip if it reaches no package index."""
    folder = tmp_path_factory.mktemp("installed")
    done = run(sys.executable, "-m", "venv", folder)
    if done.returncode:
        pytest.skip(f"no virtual environment can be created: {done.stderr.strip()[-200:]}")
    command = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    done = run(*command, "install", "--upgrade", "pip", "hatchling", "--retries", "0", "--timeout", "20")
    if done.returncode:
        pytest.skip(f"no package index can be reached: {done.stderr.strip()[-200:]}")
    return command


@pytest.fixture(scope="module")
def wheel(pip, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run(*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def extras_of(wheel: Path) -> list[str]:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return HeaderParser().parsestr(archive.read(name).decode()).get_all("Provides-Extra")


@pytest.mark.parametrize("constraints", [(), ("-c", ROOT / "constraints.txt")], ids=["latest", "tested"])
def test_all_extras_resolve_together(pip, wheel, constraints, tmp_path):
    """Only metadata is downloaded from indexes that provide it."""
    extras = [extra for extra in extras_of(wheel) if extra not in APART]
    assert len(extras) >= 9 and set(extras_of(wheel)) == {*extras, *APART}
    options = ["--dry-run", "--ignore-installed", "--report", tmp_path / "report.json", *constraints]
    done = run(*pip, "install", *options, f"{wheel}[{','.join(extras)}]")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    assert {"conceptseg-hf", "gradio", "fiftyone", "trl", "ray", "bitsandbytes", "pysodmetrics"} <= set(found)
    if constraints and sys.version_info >= (3, 11):
        pins = dict(
            line.split(";")[0].strip().split("==")
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if "==" in line
        )
        assert found["pillow"] == pins["pillow"] and found["gradio"] == pins["gradio"]


@pytest.fixture(scope="module")
def installed(pip, wheel) -> Path:
    """Install the wheel with all extras, and return the folder of its commands."""
    torch = [
        f"{name}=={version}" for name, version in versions_in_constraints("torch", "torchvision").items()
    ]
    if run(*pip, "install", "--index-url", CPU_INDEX, "--retries", "0", "--timeout", "20", *torch).returncode:
        done = run(*pip, "install", *torch)
        assert done.returncode == 0, done.stderr[-3000:]
    extras = [extra for extra in extras_of(wheel) if extra not in APART]
    done = run(*pip, "install", *torch, f"{wheel}[{','.join(extras)}]")
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(pip[0]).parent


def versions_in_constraints(*names: str) -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        name: line.split(";")[0].split("==")[1].strip()
        for name in names
        for line in lines
        if line.startswith(f"{name}==")
    }


def test_the_installed_packages_agree(pip, installed):
    done = run(*pip, "check")
    assert done.returncode == 0, done.stdout


def test_the_installed_command_segments(installed, tmp_path):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    options = {"cwd": tmp_path, "env": environment}
    done = run(installed / "conceptseg", "env", **options)
    assert done.returncode == 0, done.stderr
    assert f"conceptseg-hf: {conceptseg_hf.__version__}" in done.stdout
    assert all(f"- {name}: not installed" not in done.stdout for name in ("gradio", "trl", "fiftyone"))
    done = run(installed / "conceptseg", "demo", "--samples", "1", "--output-dir", "out", **options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "results.json").is_file()
    code = (
        "import importlib.metadata as m, importlib.util as u, pathlib as p\n"
        "import gradio, fiftyone, trl\n"
        "from conceptseg_hf.integrations.app.page import build_page\n"
        "for name in ('conceptseg_hf', 'conceptseg_trainers'):\n"
        "    assert (p.Path(u.find_spec(name).origin).parent / 'py.typed').is_file(), name\n"
        "files = [str(file) for file in m.files('conceptseg-hf')]\n"
        "assert any(file.endswith('licenses/LICENSE') for file in files)\n"
        "assert any(file.endswith('checkpoints/nano/README.md') for file in files)\n"
    )
    done = run(installed / "python", "-c", code, **options)
    assert done.returncode == 0, done.stderr
