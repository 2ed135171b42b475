"""The source distribution, the Dockerfiles and `conceptseg env`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import conceptseg_hf
from conceptseg_hf.cli import main

ROOT = Path(conceptseg_hf.__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(tmp_path):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")

    def build(folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path), *options]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    build(ROOT, "-t", "sdist")
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    build(folder, "-t", "wheel")
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "conceptseg_hf/py.typed",
        "conceptseg_trainers/py.typed",
        "conceptseg_hf/checkpoints/nano/model.safetensors",
        "conceptseg_hf/checkpoints/nano/README.md",
        "conceptseg_hf/checkpoints/mini/model.safetensors",
        "conceptseg_hf/checkpoints/mini/README.md",
        "conceptseg_hf/data/smoke_photos/README.md",
        "conceptseg_launcher.py",
    ):
        assert name in names
    package_metadata = (
        zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    )
    assert "License-Expression: Apache-2.0" in package_metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt")))
    assert b"conceptseg = conceptseg_launcher:main" in entry_points
    card = (ROOT / "conceptseg_hf/checkpoints/nano/README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_dockerfiles_install_tested_versions_in_few_layers(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    layers = re.findall(r"^(?:COPY|ADD|RUN|WORKDIR) ", text, re.MULTILINE)
    assert len(layers) <= 3
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = re.findall(r"\b(torch(?:vision)?==\S+)", text)
    assert len(pins) == 2 and all(f"\n{pin}\n" in constraints for pin in pins)
    extras = re.search(r'"/src\[([\w,]+)\]"', text)[1].split(",")
    assert all(f"\n{extra} = [" in PYPROJECT for extra in extras)
    assert "\nUSER user\n" in text


def test_env_prints_versions_and_no_secrets(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["env"]) == 0
    rows = dict(line[2:].split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["conceptseg-hf"] == conceptseg_hf.__version__
    assert rows["OMP_NUM_THREADS"] == "3"
    assert re.fullmatch(r"SHA-256 [0-9a-f]{16}", rows["embedded checkpoint"])
    text = str(rows)
    assert "secret" not in text and str(Path.home()) not in text and str(ROOT) not in text
