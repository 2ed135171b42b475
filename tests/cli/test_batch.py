"""`conceptseg batch`: the command, its messages, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import conceptseg_hf
from conceptseg_hf import ConceptPrompt
from conceptseg_hf.cli import batch, main

pytest.importorskip("pyarrow", reason="batch jobs need pyarrow")

ROOT = Path(conceptseg_hf.__file__).parents[1]
SAM = ["--router", "sam_only", "--prompt", "circle"]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """A folder with four images, of which one is damaged."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{number}.png")
    Path("images/2.png").write_bytes(b"no image")
    return tmp_path


def test_choices_are_those_of_the_package():
    from conceptseg_hf.batch.exports import FORMATS
    from conceptseg_hf.batch.run import ENGINES

    assert (batch.ENGINES, batch.FORMATS) == (ENGINES, FORMATS)


def test_table_errors_and_files(capsys):
    command = ["batch", "--images", "images", *SAM, "--out", "out", "--format", "coco"]
    assert main(command) == 0
    out, error = capsys.readouterr()
    table = [line.split() for line in out.splitlines()]
    assert table[:3] == [["images", "4"], ["shortcut", "3", "75.0%"], ["errors", "1", "25.0%"]]
    assert table[3][0] == "images/s" and float(table[3][1]) > 0
    assert out.splitlines()[4:] == ["out/results", "out/coco.json"]
    failure, warning = error.splitlines()
    assert failure == (
        f"image {str(Path('images/2.png').absolute())!r} cannot be read; it is damaged or not an image."
    )
    assert warning.startswith(
        "conceptseg batch: warning: no --model is given, and the default, nano, only knows"
    )
    assert main(command) == 0 and "images/s" not in capsys.readouterr().out
    assert main([*command, "--retry-failed"]) == 0 and "images/s" in capsys.readouterr().out
    assert main([*command, "--batch-size", "2"]) == 2
    assert capsys.readouterr().err == (
        "conceptseg batch: 'out' holds the results of another job (different batch_size); give another folder, or "
        "remove this one.\n"
    )


def test_many_errors_are_not_all_printed(capsys):
    for number in range(30):
        Path(f"images/x{number}.png").write_bytes(b"no image")
    assert main(["batch", "--images", "images", *SAM, "--out", "out"]) == 0
    error = capsys.readouterr().err
    assert error.count("cannot be read") == 10
    assert error.count("further errors are only in the results.\n") == 1


def test_job_without_any_result_fails(capsys):
    assert main(["batch", "--images", "images/2.png", *SAM, "--out", "out"]) == 2
    out, error = capsys.readouterr()
    assert ["errors", "1", "100.0%"] in [line.split() for line in out.splitlines()]
    assert error.splitlines()[-1].startswith(
        "conceptseg batch: no image could be segmented; the first one: 2.png: "
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "images"], "--prompt and --concept are missing"),
        (["--images", "images", "--prompt", " "], "--prompt is empty"),
        (["--images", "none", *SAM], "images 'none' is neither a folder nor a file"),
        (["--images", "images", "--concept", "none.safetensors"], "concept 'none.safetensors' is not a file"),
        (["--images", "images", "--concept", "images/1.png"], "'images/1.png' is not a concept"),
        (["--images", "images", "--concept", "other.safetensors"], "made with other weights"),
        (["--images", "images", *SAM, "--reference", "none.png"], "--reference 'none.png' is not a file"),
        (["--images", "images", *SAM, "--reference", "images/2.png"], "image 'images/2.png' cannot be read"),
        (["--images", "images", *SAM, "--out", "images/1.png/x"], "--out 'images/1.png/x' cannot be written"),
        (["--images", "images", *SAM, "--num-workers", "2"], "are options of --engine ray"),
        (["--images", "images", *SAM, "--model", "none"], "model 'none' is neither a folder nor a hub id"),
        (["--images", "images", *SAM, "--column", "x"], "omit the column 'x'"),
    ],
)
def test_bad_input_gives_one_sentence(words, message, capsys):
    ConceptPrompt("shadow", ("shadow",), score=0.9, model_hash="0" * 16).save("other.safetensors")
    assert main(["batch", "--out", "out", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("out/results").exists()


def test_missing_pyarrow_gives_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main(["batch", "--images", "images", *SAM, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert "batch jobs need the package pyarrow; install it with: pip install conceptseg-hf[batch]" in error


def test_missing_ray_gives_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["batch", "--images", "images", *SAM, "--out", "out", "--engine", "ray"]) == 2
    assert "install it with: pip install conceptseg-hf[ray]" in capsys.readouterr().err


def test_interrupted_job_explains_how_to_continue(capsys):
    for number in range(4, 200):
        Path(f"images/{number}.png").hardlink_to("images/1.png")
    command = ["batch", "--images", "images", *SAM, "--out", "out", "--batch-size", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "conceptseg_hf.cli", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while len(list(Path("out/unfinished").glob("*.parquet"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    line = error.splitlines()[-1]
    assert line.startswith(
        "conceptseg batch: interrupted; the records are kept in 'out', and the same command"
    )
    finished = len(list(Path("out/unfinished").glob("*.parquet")))
    assert 3 <= finished < 100 and not list(Path("out").rglob("*.tmp"))
