"""Inputs, outputs and errors of the CLI, run in this process with a random checkpoint of the nano preset."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptseg_hf import ConceptSegProcessor, cli, nano_checkpoint, shipped
from conceptseg_hf.cli import ablate, compare, evaluate
from conceptseg_hf.cli.ablate import CONFIGS
from conceptseg_hf.cli.arguments import (
    CHECKPOINTS,
    DTYPES,
    ROUTERS,
    BadInputError,
    parse_metrics,
    parse_reference,
)
from conceptseg_hf.cli.outputs import check_output_dir
from conceptseg_hf.data import SMOKE_PHOTOS
from conceptseg_hf.evaluation.running.ablation import ablation_names
from conceptseg_hf.router import ROUTER_MODES

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from trees import write_photos


@pytest.fixture()
def files(tmp_path, monkeypatch):
    """The working directory of a test, with an image, a mask and file names that contain colons."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 24), (200, 30, 30)).save("a.png")
    mask = np.zeros((24, 32), dtype=np.uint8)
    mask[4:12, 4:20] = 255
    Image.fromarray(mask).save("mask.png")
    Image.new("RGB", (32, 24)).save("odd:name:1,2,3,4.png")
    (tmp_path / "C:").mkdir()
    Image.new("RGB", (32, 24)).save("C:/b.png")
    Image.fromarray(mask).save("C:/m.png")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def command(*arguments: str) -> int:
    """Runs `conceptseg ARGUMENTS` in this process and returns the exit code."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("text", "image", "mask", "box"),
    [
        ("a.png", "a.png", None, None),
        ("a.png:mask.png", "a.png", "mask.png", None),
        ("a.png:1,2,30,20", "a.png", None, (1, 2, 30, 20)),
        ("a.png: 1.5, 2, 30, 20", "a.png", None, (1.5, 2, 30, 20)),
        ("C:/b.png", "C:/b.png", None, None),
        ("C:/b.png:C:/m.png", "C:/b.png", "C:/m.png", None),
        ("C:/b.png:1,2,30,20", "C:/b.png", None, (1, 2, 30, 20)),
        ("odd:name:1,2,3,4.png", "odd:name:1,2,3,4.png", None, None),
        ("odd:name:1,2,3,4.png:0,0,5,5", "odd:name:1,2,3,4.png", None, (0, 0, 5, 5)),
        ("odd:name:1,2,3,4.png:mask.png", "odd:name:1,2,3,4.png", "mask.png", None),
        ("https://host:80/x.png", "https://host:80/x.png", None, None),
        ("https://host/x.png:1,2,3,4", "https://host/x.png", None, (1, 2, 3, 4)),
        ("https://host/x.png:mask.png", "https://host/x.png", "mask.png", None),
        ("a.png:https://host/m.png", "a.png", "https://host/m.png", None),
    ],
)
def test_reference_is_split_at_the_right_colon(files, text, image, mask, box):
    reference = parse_reference(text)
    assert (reference.image, reference.mask, reference.box) == (image, mask, box)


def test_a_reference_may_have_several_boxes(files):
    reference = parse_reference("odd:name:1,2,3,4.png:1,2,30,20;3, 4, 9.5, 9")
    assert (reference.image, reference.mask, reference.box) == ("odd:name:1,2,3,4.png", None, None)
    assert reference.boxes == ((1, 2, 30, 20), (3, 4, 9.5, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.png:1,2,3,4;", "'1,2,3,4;' is not a box"),
        ("a.png:1,2,3,4;5,6,7", "is not a box; .* a semicolon between several boxes"),
        ("a.png:1,2,3,4;5,2,3,4", "box 5,2,3,4 is empty"),
        ("missing.png", "'missing.png' is not a file"),
        ("missing.png:1,2,3,4", "'missing.png' is not a file"),
        ("a.png:missing.png", "'missing.png' is neither a mask file nor a box"),
        ("a.png:1,2,3", "'1,2,3' is not a box"),
        ("a.png:1,2,3,4,5", "is not a box"),
        ("a.png:1,2,nan,4", "neither a mask file nor a box"),
        ("a.png:5,2,3,4", "x1 < x2"),
        ("a.png:", "is not a box"),
        ("a\0.png", "is not a file"),
        ("a.png:" + "x" * 5000, "neither a mask file nor a box"),
    ],
)
def test_invalid_references_are_explained(files, text, message):
    with pytest.raises(BadInputError, match=message):
        parse_reference(text)


def test_options_match_the_package():
    assert ROUTERS == ROUTER_MODES
    assert set(CHECKPOINTS) == set(shipped.CHECKPOINTS)
    import torch

    assert all(hasattr(torch, name) for name in DTYPES if name != "auto")
    assert sorted(CONFIGS) == ablation_names()


def test_segment_writes_mask_overlay_and_json(files, checkpoint, capsys):
    arguments = (
        "segment",
        "a.png",
        "--prompt",
        "red circle",
        "--model",
        checkpoint,
        "--router",
        "full_reasoning",
    )
    references = (
        "--reference",
        "C:/b.png:1,2,30,20",
        "--reference",
        "a.png:mask.png",
        "--reference",
        "a.png",
    )
    assert command(*arguments, *references, "--max-new-tokens", "6", "--output-dir", "out") == 0
    mask = Image.open("out/a_mask.png")
    assert mask.mode == "L" and mask.size == (32, 24)
    assert set(np.unique(np.asarray(mask))) <= {0, 255}
    assert Image.open("out/a_overlay.png").width > 3 * 300
    record = json.loads((files / "out" / "a.json").read_text())
    assert record["route"] == "reasoning" and record["mask"] == "a_mask.png" and "heatmap" not in record
    assert record["references"] == list(references[1::2])
    assert capsys.readouterr().out.splitlines()[-1].endswith("a.json")


def test_segment_on_the_shortcut_without_references(files, checkpoint, capsys):
    arguments = ("segment", "a.png", "--prompt", "red circle", "--model", checkpoint, "--router", "sam_only")
    assert command(*arguments, "--device", "cpu", "--dtype", "float32") == 0
    assert capsys.readouterr().out.startswith("shortcut: 'red circle'")
    assert (files / "conceptseg_output" / "a_mask.png").exists()


def test_words_that_the_model_does_not_know_are_named(files, capsys):
    options = ("--model", str(nano_checkpoint()), "--router", "sam_only")
    assert command("segment", "a.png", "--prompt", "striped quokka", *options) == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert warning.startswith(
        "conceptseg segment: warning: prompt 'striped quokka': the model's vocabulary does not contain 'quokka', "
    )
    assert command("segment", "a.png", "--prompt", "striped cross", *options) == 0
    assert "warning" not in capsys.readouterr().err


def test_several_images_are_referred_to_batch(files, capsys):
    assert command("segment", "a.png", "b.png", "--prompt", "red circle") == 2
    assert "b.png; it takes one image, use `conceptseg batch` for several." in capsys.readouterr().err


def test_images_with_the_same_name_have_separate_results(files, checkpoint):
    Image.new("RGB", (20, 10)).save("C:/a.png")
    Image.new("RGB", (10, 20)).save("a.jpg")
    images = ("a.png", "C:/a.png", "a.jpg", "C:/b.png")
    (files / "out").mkdir()
    (files / "out" / "b.json").write_text('["mine"]')
    for image in (*images, "./C:/a.png"):
        options = ("--model", checkpoint, "--router", "sam_only", "--output-dir", "out")
        assert command("segment", image, "--prompt", "red circle", *options) == 0
    names = ("a", "a-2", "a-3", "b-2")
    assert {path.name for path in (files / "out").glob("*.json")} == {"b.json", *(f"{n}.json" for n in names)}
    for image, name in zip(images, names, strict=True):
        record = json.loads((files / "out" / f"{name}.json").read_text())
        assert files / record["image"] == files / image and record["mask"] == f"{name}_mask.png"
        assert Image.open(files / "out" / record["mask"]).size == Image.open(image).size
    assert (files / "out" / "b.json").read_text() == '["mine"]'


def segment_arguments(image, checkpoint, *options):
    return (
        *("segment", str(image), "--prompt", "red circle", "--model", checkpoint, "--router", "sam_only"),
        *options,
    )


def test_files_of_the_user_are_kept(files, checkpoint):
    shutil.copy("mask.png", "a_mask.png")
    (files / "b_overlay.png").write_text("mine")
    Image.new("RGB", (10, 10)).save("b.png")
    before = (files / "a_mask.png").read_bytes()
    options = ("--reference", "a.png:a_mask.png", "--output-dir", ".")
    for image in ("a.png", "a.png", "b.png"):
        assert command(*segment_arguments(image, checkpoint, *options)) == 0
    assert (files / "a_mask.png").read_bytes() == before and not (files / "a.json").exists()
    assert (files / "b_overlay.png").read_text() == "mine"
    assert {path.name for path in files.glob("*.json")} == {"a-2.json", "b-2.json"}


def test_results_used_as_references_are_kept(files, checkpoint):
    assert command(*segment_arguments("a.png", checkpoint, "--output-dir", ".")) == 0
    shutil.copy("mask.png", "a_mask.png")  # a result that was edited manually
    before = (files / "a_mask.png").read_bytes()
    arguments = segment_arguments(
        "a.png", checkpoint, "--output-dir", ".", "--reference", "C:/../a.png:./a_mask.png"
    )
    assert command(*arguments) == 0
    assert (files / "a_mask.png").read_bytes() == before and (files / "a-2.json").exists()


def test_results_distinguish_working_directories(files, checkpoint, monkeypatch):
    options = ("--output-dir", str(files / "out"))
    for folder, size in (("x", (20, 10)), ("y", (10, 20))):
        (files / folder).mkdir()
        Image.new("RGB", size).save(files / folder / "a.png")
        monkeypatch.chdir(files / folder)
        assert command(*segment_arguments("a.png", checkpoint, *options)) == 0
    monkeypatch.chdir(files)
    assert command(*segment_arguments("x/a.png", checkpoint, *options)) == 0
    sizes = {path.name: Image.open(path).size for path in (files / "out").glob("*_mask.png")}
    assert sizes == {"a_mask.png": (20, 10), "a-2_mask.png": (10, 20)}
    assert json.loads((files / "out" / "a-2.json").read_text())["image"] == str(files / "y" / "a.png")


def test_segment_with_several_boxes_and_a_profile(files, checkpoint, capsys, monkeypatch):
    calls = []
    prepare = ConceptSegProcessor.prepare

    def spy(self, image, prompt, references, **options):
        sample = prepare(self, image, prompt, references, **options)
        calls.append((references, sample))
        return sample

    monkeypatch.setattr(ConceptSegProcessor, "prepare", spy)
    arguments = (
        "segment",
        "a.png",
        "--prompt",
        "red circle",
        "--model",
        checkpoint,
        "--router",
        "full_reasoning",
    )
    options = ("--max-new-tokens", "2", "--profile", "released")
    references = (
        "--reference",
        "C:/b.png:0,0,16,12;16,12,32,24",
        "--reference",
        "a.png:8,6,16,12;20,6,24,18",
    )
    assert command(*arguments, *references, *options, "--output-dir", "out") == 0
    [(parsed, sample)] = calls
    assert [reference.boxes for reference in parsed] == [
        ((0, 0, 16, 12), (16, 12, 32, 24)),
        ((8, 6, 16, 12), (20, 6, 24, 18)),
    ]
    # The second of 2 x 2 cells on a canvas of 64 pixels, which are scaled to 100 text units; x2 and y2 are the last
    # pixels.
    scale = 100 / 64
    expected = [(40, 8, 47, 15), (52, 8, 55, 23)]
    assert [pytest.approx(box) for box in sample.frame.support_boxes] == [
        tuple(value * scale for value in box) for box in expected
    ]
    record = json.loads((files / "out" / "a.json").read_text())
    assert record["profile"] == "released" and record["references"] == list(references[1::2])
    assert "profile released: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("segment", "missing.png", "--prompt", "x"), "image 'missing.png' is not a file"),
        (("segment", "a.png", "--prompt", " "), "--prompt is empty"),
        (("segment", "a.png"), "--prompt"),
        (("segment", "a.png", "--prompt", "x", "--router", "other"), "'other'"),
        (("segment", "a.png", "--prompt", "x", "--max-new-tokens", "0"), "positive integer"),
        (("segment", "a.png", "--prompt", "x", "--reference", "b.png"), "'b.png' is not a file"),
        (("segment", "a.png", "--prompt", "x", "--model", "./missing"), "neither a folder nor a hub id"),
        (("info", "--model", "x" * 5000), "neither a folder nor a hub id"),
        (("segment", "a.png", "--prompt", "x", "--model", "."), "has no config.json"),
        (("segment", "text.png", "--prompt", "x", "--model", "CHECKPOINT"), "cannot be read"),
        (("segment", "a.png", "--prompt", "x", "--model", "CHECKPOINT", "--device", "other"), "'other'"),
        (
            (
                "segment",
                "a.png",
                "--prompt",
                "x",
                "--model",
                "CHECKPOINT",
                "--reference",
                "a.png:90,90,99,99",
            ),
            "reference 0",
        ),
        (
            ("segment", "a.png", "--prompt", "x", "--model", "nobody/nothing"),
            "cannot be downloaded from the Hub",
        ),
        (("evaluate", "--benchmark", "other"), "no benchmark is named 'other'"),
        (("evaluate", "--split", "other"), "no split is named 'other'"),
        (("evaluate", "--groups", "which one,other"), "groups is ['which one', 'other']; use some of"),
        (("evaluate", "--groups", "saliency", "--benchmark", "cd"), "stands for several benchmarks"),
        (("evaluate", "--root", "data"), "reads no files"),
        (("evaluate", "--limit", "none"), "positive integer"),
        (("evaluate", "--benchmark", "cd"), "8 of 8 benchmarks cannot be read"),
        (("evaluate", "--benchmark", "cd", "--split", "train"), "uses the paper's splits"),
        (("evaluate", "--judgements", "missing.csv", "--model", "CHECKPOINT"), "is not a file"),
        (("evaluate", "--protocol", "other", "--model", "CHECKPOINT"), "no protocol is named 'other'"),
        (("info", "--model", "./missing"), "neither a folder nor a hub id"),
        (
            (
                "segment",
                "a.png",
                "--prompt",
                "x",
                "--model",
                "CHECKPOINT",
                "--reference",
                "a.png:.1,.1,.9,.9",
            ),
            "lies within one pixel",
        ),
        (("other",), "'other'"),
        ((), "SUBCOMMAND"),
    ],
)
def test_invalid_input_exits_with_2_and_one_sentence(files, checkpoint, capsys, arguments, message):
    assert command(*(checkpoint if argument == "CHECKPOINT" else argument for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("conceptseg")]
    assert len(errors) == 1 and errors[0].endswith(".")
    assert captured.out == ""


SEGMENT = ("segment", "a.png", "--prompt", "x")
CONVERT = ("convert", "--checkpoint", "nobody/nothing", "--sam", "nobody/nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*SEGMENT, "--output-dir", "text.png"),
            "--output-dir 'text.png' cannot be written: 'text.png' is a file",
        ),
        ((*SEGMENT, "--output-dir", "text.png/a/b"), "'text.png' is a file"),
        ((*SEGMENT, "--output-dir", "taken"), "'taken/a_mask.png' is a folder"),
        ((*SEGMENT, "--output-dir", "x" * 5000), "name too long"),
        ((*SEGMENT, "--output-dir", "a\0b"), "null"),
        (("demo", "--output-dir", "text.png/a"), "'text.png' is a file"),
        (("evaluate", "--output-dir", "text.png"), "'text.png' is a file"),
        (("evaluate", "--output-dir", "taken"), "'taken/report.md' is a folder"),
        (("evaluate", "--annotation-sheet", "taken"), "--annotation-sheet 'taken' cannot be written"),
        (("evaluate", "--annotation-sheet", "text.png/a.csv"), "'text.png' is a file"),
        (("ablate", "--config", "router", "--output-dir", "text.png/a"), "'text.png' is a file"),
        (("ablate", "--config", "router", "--output-dir", "taken"), "'taken/ablation.md' is a folder"),
        (("compare", "C:", "C:", "--output-dir", "text.png"), "'text.png' is a file"),
        ((*CONVERT, "--out", "text.png"), "--out 'text.png' cannot be written: 'text.png' is a file"),
        ((*CONVERT, "--out", "text.png/a"), "'text.png' is a file"),
    ],
)
def test_unwritable_outputs_are_rejected_before_loading(files, monkeypatch, capsys, arguments, message):
    def never(*_, **__):
        raise AssertionError("a model or data was loaded")

    for subcommand in ("segment", "demo", "evaluate", "ablate"):
        monkeypatch.setattr(f"conceptseg_hf.cli.{subcommand}.load_model", never)
    monkeypatch.setattr("conceptseg_hf.data.load_benchmarks", never)
    monkeypatch.setattr("conceptseg_hf.evaluation.reporting.comparison.compare", never)
    monkeypatch.setattr("conceptseg_hf.conversion.convert", never)
    for name in ("a_mask.png", "report.md", "ablation.md"):
        (files / "taken" / name).mkdir(parents=True)
    (files / "taken" / "a.json").write_text(json.dumps({"image": "a.png"}))  # of an earlier run
    before = sorted(files.rglob("*"))
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message.lower() in error.lower() and error.count("\n") == 1 and "; give another" in error
    assert sorted(files.rglob("*")) == before


def test_output_folder_is_checked_but_not_created(files, monkeypatch):
    assert check_output_dir("new/deep", "report.md").parts == ("new", "deep")
    assert not (files / "new").exists()

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(
        BadInputError, match=r"'new' cannot be written: '\.': Permission denied; give another"
    ):
        check_output_dir("new")


def test_checkpoint_of_another_model_is_rejected(files, checkpoint, capsys):
    folder = files / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert command("info", "--model", str(folder)) == 2
    assert "not a ConceptSeg checkpoint" in capsys.readouterr().err


def test_a_missing_embedded_checkpoint_is_explained(files, monkeypatch, capsys):
    monkeypatch.setattr("conceptseg_hf.shipped.__file__", str(files / "shipped.py"))
    assert command("info") == 2
    assert "make nano" in capsys.readouterr().err


def test_keyboard_interrupt_prints_no_traceback(files, checkpoint, monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("conceptseg_hf.cli.segment.load_model", interrupted)
    assert command("segment", "a.png", "--prompt", "x") == 130
    assert "interrupted" in capsys.readouterr().err


def test_info_counts_parameters(checkpoint, capsys):
    assert command("info", "--model", checkpoint) == 0
    output = capsys.readouterr().out
    assert "transformers" in output and "qwen2_5_vl" in output and "M parameters" in output


def test_evaluate_prints_a_summary_and_can_be_repeated(files, checkpoint, capsys):
    arguments = (
        "evaluate",
        "--model",
        checkpoint,
        "--limit",
        "3",
        "--router",
        "sam_only",
        "--batch-size",
        "2",
    )
    assert command(*arguments) == 0
    first = capsys.readouterr().out
    assert first.splitlines()[-1].startswith("foreground IoU: CI ")
    folder = files / "evaluation_output" / "concept-shapes-test-sam_only"
    # The heatmaps are those of CoPRS.
    assert {path.name for path in folder.iterdir()} == {*evaluate.FILES} - {"heatmaps.html"}
    assert command(*arguments) == 0
    assert capsys.readouterr().out == first


def test_metrics_may_contain_spaces():
    assert parse_metrics(" giou, miou") == ("giou", "miou")
    assert parse_metrics(" all ")[-1] == "s_measure"


def write_own_data(root, color):
    for folder, mode, value in (("images", "RGB", color), ("masks", "L", 255)):
        (root / folder).mkdir(parents=True)
        Image.new(mode, (20, 20), value).save(root / folder / "one.png")
    (root / "prompt.txt").write_text("red square")


@pytest.mark.parametrize("subcommand", [("evaluate",), ("ablate", "--config", "mine.yaml")])
def test_records_of_another_root_are_rejected(files, checkpoint, capsys, subcommand):
    (files / "mine.yaml").write_text("variants: {plain: {router: sam_only}, other: {router: sam_only}}")
    for root, color in (("A", "red"), ("B", "blue")):
        write_own_data(files / root, color)
    options = ("--benchmark", "plain", "--model", checkpoint)
    assert command(*subcommand, *options, "--root", "A") == 0
    capsys.readouterr()
    assert command(*subcommand, *options, "--root", "B") == 2
    assert "holds the records of another run (different samples, such as 'one')" in capsys.readouterr().err


def test_closed_pipe_prints_no_traceback(files):
    code = "import sys; from conceptseg_hf.cli import main; sys.exit(main(['data', 'list']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # before anything is written
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141
    assert "Traceback" not in error and "BrokenPipe" not in error


def test_package_can_be_run_as_a_module(files):
    done = subprocess.run(
        [sys.executable, "-m", "conceptseg_hf", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("conceptseg ")


def test_compare_pairs_two_evaluations(files, checkpoint, capsys):
    for router in ("sam_only", "adaptive"):
        options = ("--model", checkpoint, "--limit", "3", "--router", router, "--output-dir", router)
        assert command("evaluate", *options) == 0
    assert command("compare", "sam_only", "adaptive", "--output-dir", "both") == 0
    output = capsys.readouterr().out
    assert "A: sam_only, B: adaptive; 3 samples in both runs." in output
    assert {path.name for path in (files / "both").iterdir()} == {*compare.FILES}
    assert command("compare", "sam_only", "nowhere") == 2
    assert capsys.readouterr().err.startswith("conceptseg compare: 'nowhere' is not a folder;")
    assert command("evaluate", *options[:-1], "paper", "--protocol", "paper") == 0
    assert command("compare", "adaptive", "paper") == 2
    assert "protocols standard and paper" in capsys.readouterr().err


def test_compare_without_data_writes_no_gallery(files, checkpoint, capsys):
    options = ("--model", checkpoint, "--limit", "1", "--router", "sam_only")
    for name in ("a", "b"):
        assert command("evaluate", *options, "--output-dir", name) == 0
        settings = json.loads((files / name / "settings.json").read_text()) | {"benchmark": "plain"}
        (files / name / "settings.json").write_text(json.dumps(settings))
    assert command("compare", "a", "b", "--output-dir", "both") == 0
    assert "gallery.html was not written" in capsys.readouterr().out
    assert not (files / "both" / "gallery.html").exists()


def test_ablate_runs_the_variants_of_a_file(files, checkpoint, capsys):
    (files / "mine.yaml").write_text("variants: {plain: {router: sam_only}, adaptive: {router: adaptive}}")
    options = ("--model", checkpoint, "--limit", "2", "--output-dir", "out")
    assert command("ablate", "--config", "mine.yaml", *options) == 0
    output = capsys.readouterr().out
    assert output.endswith("out/ablation.md\n")
    assert "| plain " in output and "| adaptive " in output
    assert (files / "out" / "adaptive" / "records.jsonl").exists()
    assert {path.name for path in (files / "out").glob("*.*")} == {*ablate.FILES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "other"], "ablation 'other' is neither a file nor one of"),
        (["--config", "concept_queries"], "variant 'L2 = 1' needs a checkpoint with 1 concept queries"),
        (
            ["--config", "router", "--variant-model", "adaptive"],
            "--variant-model is 'adaptive'; give VARIANT=PATH",
        ),
        (
            ["--config", "router", "--variant-model", "x=nowhere"],
            "'nowhere' is neither a folder nor a hub id",
        ),
        (["--config", "router", "--benchmark", "nothing"], "no benchmark is named 'nothing'"),
    ],
)
def test_ablate_errors_are_one_sentence(files, checkpoint, capsys, arguments, message):
    assert command("ablate", "--model", checkpoint, "--limit", "1", "--output-dir", "out", *arguments) == 2
    *_, error = capsys.readouterr().err.splitlines()  # progress bars may be printed first
    assert error.startswith("conceptseg ablate: ") and message in error


def test_evaluate_writes_an_annotation_sheet_and_reads_judgements(files, checkpoint, capsys):
    options = ("--limit", "1", "--router", "full_reasoning", "--output-dir", "out")
    arguments = ("evaluate", "--model", checkpoint, *options)
    assert command(*arguments, "--annotation-sheet", "new/sheet.csv", "--judgements", "exact-rule") == 0
    assert "new/sheet.csv" in capsys.readouterr().out.splitlines()
    with (files / "new" / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sample_id"] for row in rows] == ["test-000000"]
    for row in rows:
        row["think"], row["rule"] = "true", "false"
    with (files / "judged.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert command(*arguments, "--judgements", "judged.csv") == 0
    outcomes = json.loads((files / "out" / "report.json").read_text())["outcomes"]
    assert sum(row["count"] for row in outcomes if row["think"] and row["rule"] is False) == 1
    capsys.readouterr()
    assert command(*arguments, "--annotation-sheet", "new/sheet.csv") == 2
    assert "already exists" in capsys.readouterr().err


def test_evaluate_several_benchmarks(files, checkpoint, capsys):
    pytest.importorskip("scipy")
    pytest.importorskip("py_sod_metrics", exc_type=ImportError)
    for folder, name in (("images", "a.png"), ("masks", "mask.png")):
        (files / "own" / folder).mkdir(parents=True)
        Image.open(name).save(f"own/{folder}/one.png")
    (files / "own" / "prompt.txt").write_text("red square")
    arguments = ("evaluate", "--benchmark", "concept-shapes,plain", "--model", checkpoint, "--limit", "2")
    options = ("--router", "sam_only", "--metrics", "all", "--protocol", "paper", "--output-dir", "out")
    assert command(*arguments, *options, "--root", "plain=own") == 0
    report = json.loads((files / "out" / "report.json").read_text())
    assert [row["samples"] for row in report["settings"]["benchmarks"]] == [2, 1]
    assert {*report["settings"]["metrics"]} > {"f_w", "s_measure"}
    assert (files / "out" / "plain-test" / "records.jsonl").is_file()
    capsys.readouterr()
    assert command(*arguments, *options, "--root", "own", "--root", "other") == 2
    assert "second folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nano", "conceptseg-mini"])
def test_embedded_checkpoints_are_selected_by_name(name, tmp_path, capsys):
    photo = SMOKE_PHOTOS / "images" / "coins.jpg"
    options = ("--prompt", "coin", "--router", "sam_only", "--output-dir", str(tmp_path))
    assert command("segment", str(photo), "--model", name, *options) == 0
    assert (tmp_path / "coins_mask.png").is_file()


def test_demo_writes_a_visualization_per_sample(files, checkpoint, capsys):
    arguments = (
        "demo",
        "--model",
        checkpoint,
        "--samples",
        "3",
        "--router",
        "sam_only",
        "--output-dir",
        "demo",
    )
    assert command(*arguments) == 0
    records = json.loads((files / "demo" / "results.json").read_text())
    drawings, photographs = (
        ["test-000000", "test-000001", "test-000002"],
        [f"salient-{name}" for name in ("astronaut", "rocket", "cell")],
    )
    assert [record["sample_id"] for record in records] == drawings + photographs
    assert [record["picture"][:3] for record in records] == [f"0{number}_" for number in range(1, 7)]
    for record in records:
        assert Image.open(files / "demo" / record["picture"]).height > 320
        assert 0 <= record["foreground_iou"] <= 1
    assert capsys.readouterr().out.count("mean foreground IoU") == 2


def test_demo_shows_a_sample_of_each_group_of_photographs(files, checkpoint, monkeypatch):
    root = write_photos(
        files / "photos",
        (
            ("ecssd", "CD", ("salient object segmentation",) * 20),
            ("coco128", "CI", ("bus", "clock") * 12),
        ),
    )
    monkeypatch.setenv("CONCEPTSEG_PHOTOS", str(root))
    options = ("--model", checkpoint, "--samples", "1", "--router", "sam_only", "--output-dir", "demo")
    assert command("demo", *options) == 0
    records = json.loads((files / "demo" / "results.json").read_text())
    assert [record["dataset"] for record in records[2:]] == ["coco128", "ecssd"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (nano_checkpoint() / "config.json").is_file(), reason="the embedded checkpoint is missing"
)
def test_demo_covers_levels_and_routes(tmp_path):
    assert command("demo", "--output-dir", str(tmp_path)) == 0
    records = json.loads((tmp_path / "results.json").read_text())
    assert len(list(tmp_path.glob("*.png"))) == len(records) >= 8
    assert {record["level"] for record in records} == {"CI", "CD", "CR"}
    assert {record["route"] for record in records} == {"shortcut", "reasoning"}
