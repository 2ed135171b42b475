"""Failures of the CLI: full disks, Ctrl-C, terminals without Unicode, misspelled arguments."""

from __future__ import annotations

import json
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
from conceptseg_hf import cli
from conceptseg_hf.cli.outputs import shorten_name
from conceptseg_hf.cli.train import RECIPES

ROOT = Path(conceptseg_hf.__file__).parents[1]


@pytest.fixture()
def files(tmp_path, monkeypatch):
    """The working directory of a test, with a noise image."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    return tmp_path


@pytest.fixture()
def environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "trainers")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*arguments: str) -> int:
    """Runs `conceptseg ARGUMENTS` in this process and returns the exit code."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


def segment_arguments(image: str, checkpoint: str, folder: str = "out") -> list[str]:
    arguments = ["segment", image, "--prompt", "red circle", "--model", checkpoint]
    return [*arguments, "--router", "sam_only", "--output-dir", folder]


# -- full disks --


@pytest.fixture()
def run_limited(limited_files, capsys):
    """Return a function that runs commands with a limited file size and returns exit codes and lines of errors."""

    def run(limit: int, *commands: list[str]) -> tuple[list[int], list[str]]:
        capsys.readouterr()
        with limited_files(limit):
            codes = [command(*arguments) for arguments in commands]
        return codes, capsys.readouterr().err.splitlines()

    return run


def test_full_disk_is_one_sentence_and_leaves_no_partial_files(files, checkpoint, run_limited):
    """The overlay, the records and the visualizations exceed the limit; the mask does not."""
    assert command(*segment_arguments("a.png", checkpoint)) == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    evaluation = ["evaluate", "--model", checkpoint, "--router", "sam_only", "--limit", "60"]
    codes, errors = run_limited(
        20_000,
        segment_arguments("a.png", checkpoint),
        segment_arguments("a.png", checkpoint, "new"),
        [*evaluation, "--output-dir", "ev"],
        ["demo", "--model", checkpoint, "--router", "sam_only", "--output-dir", "pictures"],
    )
    message = "cannot be written: File too large; free some disk space"
    assert codes == [2, 2, 2, 2]
    assert errors == [
        f"conceptseg segment: 'out/a_overlay.png' {message}, or give another folder.",
        f"conceptseg segment: 'new/a_overlay.png' {message}, or give another folder.",
        f"conceptseg evaluate: 'ev/records.jsonl' {message} and run again to resume from the existing records.",
        f"conceptseg demo: 'pictures/01_CI_diverse-classes.png' {message}, or give another folder.",
    ]
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    assert list(Path("new").iterdir()) == list(Path("pictures").iterdir()) == []

    count = Path("ev/records.jsonl").read_bytes().count(b"\n")
    assert 0 < count < 60
    assert command(*evaluation, "--output-dir", "ev") == 0
    assert command(*evaluation, "--output-dir", "whole") == 0
    assert Path("ev/records.jsonl").read_bytes() == Path("whole/records.jsonl").read_bytes()
    assert command(*segment_arguments("a.png", checkpoint, "new")) == 0
    assert {path.name for path in Path("new").iterdir()} == before.keys(), "no files with suffix -2"


def test_empty_files_of_earlier_versions_are_overwritten(files, checkpoint):
    Path("out").mkdir()
    Path("out/a_mask.png").touch()
    assert command(*segment_arguments("a.png", checkpoint)) == 0
    assert {path.name for path in Path("out").iterdir()} == {"a.json", "a_mask.png", "a_overlay.png"}


def test_full_disk_is_detected_before_loading(files, run_limited):
    codes, errors = run_limited(1000, segment_arguments("a.png", "nobody/nothing"))
    assert codes == [2]
    assert errors == [
        "conceptseg segment: --output-dir 'out' cannot be written: '.': File too large; give another folder."
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is missing")
def test_full_standard_output_is_one_sentence(environment):
    with Path("/dev/full").open("w") as full:
        arguments = [sys.executable, "-m", "conceptseg_hf.cli", "data", "list"]
        done = subprocess.run(arguments, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("conceptseg data: ") and done.stderr.count("\n") == 1
    assert "cannot be written: No space left on device;" in done.stderr


# -- Ctrl-C --


def handle_interrupts() -> None:
    """Restores the handler of SIGINT, which some shells ignore in background processes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_interrupted_evaluation_explains_how_to_resume(files, checkpoint, environment):
    arguments = [
        "evaluate",
        "--model",
        checkpoint,
        "--limit",
        "4000",
        "--router",
        "sam_only",
        "--output-dir",
        "ev",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "conceptseg_hf.cli", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=handle_interrupts,
    )
    records = Path("ev/records.jsonl")
    while not records.exists() or not records.stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.startswith("conceptseg evaluate: interrupted; the records are kept in 'ev'")
    assert error.count("\n") == 1


def test_interrupted_segment_prints_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("conceptseg_hf.cli.segment.check_image", interrupted)
    assert command("segment", "a.png", "--prompt", "x") == 130
    assert capsys.readouterr().err == "conceptseg segment: interrupted.\n"


# -- names and encodings --


@pytest.mark.parametrize("stem", ["a" * 251, "é" * 125, "概" * 83 + "é"], ids=["ASCII", "two bytes", "three"])
def test_results_of_images_with_the_longest_names(files, checkpoint, stem, capsys):
    image, twin = f"{stem}.png", f"{stem[:-1]}b.png"
    for name in (image, twin):
        Path(name).write_bytes(Path("a.png").read_bytes())
        assert command(*segment_arguments(name, checkpoint)) == 0
    assert command(*segment_arguments(image, checkpoint)) == 0
    names = {path.name for path in Path("out").iterdir()}
    kept = [path.stem for path in Path("out").glob("*.json")]
    assert len(kept) == 2 and all(stem.startswith(name.rpartition("-")[0]) for name in kept)
    assert names == {f"{name}{end}" for name in kept for end in (".json", "_mask.png", "_overlay.png")}
    assert max(len(os.fsencode(name)) for name in names) <= 255
    images = {json.loads(path.read_text())["image"] for path in Path("out").glob("*.json")}
    assert images == {str(files / image), str(files / twin)}


def test_shorten_name_cuts_between_characters():
    assert shorten_name("a" * 240, 15) == "a" * 240
    short = shorten_name("a" + "é" * 200, 15)
    assert short.startswith("aé") and len(short.encode()) <= 240 and short.encode().decode() == short
    assert shorten_name("b" * 241, 15) != shorten_name("b" * 242, 15)
    assert len(shorten_name("\udcff" * 300, 15).encode("utf-8", "surrogateescape")) <= 240


@pytest.fixture()
def own_data(files):
    """Two samples with non-ASCII file names and prompts; the mask of one is damaged."""
    rows = []
    for name in ("grün", "blau_ü"):
        pixels = np.asarray(Image.open("a.png"))
        for folder, content in (("images", pixels), ("masks", (pixels[..., 0] > 128).astype(np.uint8) * 255)):
            (files / "own" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(f"own/{folder}/{name}.png")
        rows.append({"image": f"images/{name}.png", "mask": f"masks/{name}.png", "prompt": "rotes Häuschen"})
    Path("own/masks/blau_ü.png").write_bytes(b"not an image")
    Path("own/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files / "own"


LOCALES = {
    "ASCII output": {"PYTHONIOENCODING": "ascii"},
    "strict C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.mark.parametrize(
    "locale", [pytest.param(name, marks=pytest.mark.heavy if name == "strict C" else ()) for name in LOCALES]
)
def test_non_ascii_names_and_prompts_in_any_locale(own_data, checkpoint, environment, locale):
    base = [sys.executable, "-m", "conceptseg_hf.cli"]
    options = ["--model", checkpoint, "--router", "sam_only"]
    evaluation = ["evaluate", "--benchmark", "plain", "--root", "own", *options, "--output-dir", "ev"]
    done = subprocess.run(
        [*base, *evaluation], env=environment | LOCALES[locale], capture_output=True, encoding="latin-1"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("foreground IoU: ")
    assert {path.name for path in Path("ev").iterdir()} >= {"report.md", "report.json", "gallery.html"}
    report = Path("ev/report.md").read_text(encoding="utf-8")
    assert "blau_ü" in report and "grün" not in report, "only the failed sample is named"
    segmentation = ["segment", "own/images/grün.png", "--prompt", "rotes Häuschen", *options]
    done = subprocess.run(
        [*base, *segmentation, "--output-dir", "out"],
        env=environment | LOCALES[locale],
        capture_output=True,
        encoding="latin-1",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(Path("out/grün.json").read_text(encoding="utf-8"))
    assert record["prompt"] == "rotes Häuschen" and record["image"].endswith("grün.png")


def test_no_progress_bars_in_pipes(files, checkpoint, capfd):
    arguments = ["evaluate", "--model", checkpoint, "--limit", "9", "--router", "sam_only"]
    assert command(*arguments, "--output-dir", "ev") == 0
    output, error = capfd.readouterr()
    assert error == "" and "\r" not in output


# -- suggestions --


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["segmnt", "a.png"], "'segment'"),
        (["--versin"], "'--version'"),
        (["segment", "a.png", "--promt", "x"], "'--prompt'"),
        (["segment", "a.png", "--prompt", "x", "--refernce=b.png"], "'--reference'"),
        (["segment", "a.png", "--prompt", "x", "--router", "adaptve"], "'adaptive'"),
        (["evaluate", "--bechmark", "DUTS"], "'--benchmark'"),
        (["data", "chek", "DUTS"], "'check'"),
        (["data", "check", "DUT", "--root", "."], "'DUTS'"),
        (["data", "check", "duts", "--root", "."], "'DUTS'"),
        (["evaluate", "--benchmark", "tabel1", "--root", "."], "'table1'"),
        (["evaluate", "--benchmark", "DUTS,Polip", "--root", "."], "'Polyp'"),
        (["evaluate", "--split", "tset"], "'test'"),
        (["ablate", "--config", "ruoter"], "'router'"),
        (["train", "sfd"], "'sft'"),
    ],
    ids=" ".join,
)
def test_misspelled_arguments_cause_a_suggestion(files, capsys, arguments, suggestion):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert f"(did you mean {suggestion}?)" in error and error.count("\n") == 1


def test_unknown_arguments_without_similar_names_cause_no_suggestion(files, capsys):
    for arguments in (["evaluate", "--benchmark", "zzz"], ["segment", "a.png", "--prompt", "x", "--zzz"]):
        assert command(*arguments) == 2
        assert "did you mean" not in capsys.readouterr().err


def test_recipes_in_the_help_match_the_trainers():
    pytest.importorskip("trl")
    from conceptseg_trainers.scripts.recipe_parser import recipe_names

    assert list(RECIPES) == recipe_names()
