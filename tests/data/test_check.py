"""`conceptseg data check` and `conceptseg data list`."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from conceptseg_hf.cli import main
from conceptseg_hf.data import GROUPS, SUITE, ConceptShapes, check_benchmark, check_benchmarks


def test_complete_files_with_a_different_count(polyp_root):
    (check,) = check_benchmark("Polyp", polyp_root())
    assert (check.split, check.found, check.expected, check.matches, check.missing) == (
        "test",
        3,
        798,
        False,
        (),
    )
    assert not check.complete


def test_count_of_the_paper(authors_tree):
    authors_tree.add("train", "ultra_rare", "Abies", "t")
    for number in range(52):
        authors_tree.add("test", "ultra_rare", "Abies", f"x{number}")
    (check,) = check_benchmark("ultra_rare", authors_tree.write())
    assert check.complete and check.files == 2 * 53


def test_missing_files_and_references(authors_tree):
    for stem in ("a", "b"):
        authors_tree.add("test", "rare", "Abies", stem)
    root = authors_tree.write()
    (root / "rare/test/mask/a.png").unlink()
    (check,) = check_benchmark("rare", root)
    assert [path.name for _, path in check.missing] == ["a.png"] and check.without_references == ("Abies",)
    text = "\n".join(check.lines())
    assert "missing: 1 of 4 files (mask 1)" in text and "class 'Abies' has none" in text


def test_command(polyp_root, tmp_path, capsys):
    root = str(polyp_root())
    assert main(["data", "check", "Polyp", "--root", root]) == 1
    output = capsys.readouterr().out
    assert (
        "Polyp, test: 3 samples of 3 images" in output
        and "count: differs from the paper (798 samples)" in output
    )
    assert "files: all" in output and "published at https://" in output

    assert main(["data", "check", "Polyp", "--root", str(tmp_path)]) == 1
    assert "all_meta.json" in capsys.readouterr().out

    for arguments, message in (
        (["data", "check", "nothing", "--root", root], "no benchmark is named 'nothing'"),
        (["data", "check", "Polyp"], "'Polyp' reads files; give root="),
        (["data", "check", "cd", "--root", root, "--split", "train"], "uses the paper's splits"),
        (["data", "check", "Polyp", "--root", f"{root}/nowhere"], "is not a folder"),
        (["data", "check", "Polyp", "--root", root, "--split", "dev"], "no split 'dev'"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_groups_and_lists_of_benchmarks(polyp_root, tmp_path, capsys):
    root = polyp_root()
    names = [(check.name, check.split) for check in check_benchmarks("CD,Polyp", root)]
    assert names == list(GROUPS["cd"])
    own = tmp_path / "own"
    ConceptShapes("val", length=3).export(own)
    roots = ["--root", str(root), "--root", f"plain={own}"]
    assert main(["data", "check", "Polyp, concept-shapes,plain", *roots]) == 1
    output = capsys.readouterr().out
    assert all(
        line in output for line in ("Polyp, test: 3 samples", "plain, test: 3 samples", "needs none\n")
    )
    assert "not complete (1 of 3 benchmarks); published at https://" in output
    assert main(["data", "check", "table1", "--root", str(root)]) == 1
    assert "not complete (20 of 20 benchmarks); published at https://" in capsys.readouterr().out


def test_concept_shapes_needs_no_files(capsys):
    assert main(["data", "check", "concept-shapes"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("concept-shapes, test: 1200 samples") and output.endswith("complete\n")
    for arguments, message in (
        (["--root", "data"], "reads no files; leave root out"),
        (["--split", "dev"], "no split is named 'dev'"),
    ):
        assert main(["data", "check", "concept-shapes", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_benchmark_without_a_paper_count_is_complete_if_all_files_exist(tmp_path, capsys):
    ConceptShapes("val", length=3).export(tmp_path)
    assert main(["data", "check", "plain", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("complete\n")
    next(tmp_path.glob("images/*.png")).unlink()
    assert main(["data", "check", "plain", "--root", str(tmp_path)]) == 1


def test_custom_data_is_checked_in_all_splits(tmp_path, capsys):
    ConceptShapes("val", length=4).export(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for line, split in zip(lines, ("train", "train", "val", "calibration"), strict=True):
        line["split"] = split
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / lines[3]["mask"]).write_bytes(b"not an image")
    assert main(["data", "check", "plain", "--root", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if line.startswith("plain")] == [
        "plain, train: 2 samples of 2 images",
        "plain, val: 1 samples of 1 images",
        "plain, calibration: 1 samples of 1 images",
    ]
    assert "samples: 1 of 1 cannot be used" in output and "cannot be read; it is damaged" in output
    assert main(["data", "check", "plain", "--root", str(tmp_path), "--split", "train"]) == 0
    assert "val" not in capsys.readouterr().out


def test_unknown_split_is_an_error(tmp_path, capsys):
    ConceptShapes("val", length=2).export(tmp_path)
    text = (tmp_path / "samples.jsonl").read_text().replace('"prompt"', '"split": "train", "prompt"')
    (tmp_path / "samples.jsonl").write_text(text)
    assert main(["data", "check", "plain", "--root", str(tmp_path), "--split", "dev"]) == 1
    output = capsys.readouterr().out
    assert "seeds" not in output
    assert "plain, dev: 'plain' has no split 'dev'; its rows are in 'train' (2)." in output
    (check,) = check_benchmark("plain", tmp_path, split="dev")
    assert check.fault is not None and not check.complete


def test_benchmark_without_samples_in_the_metadata(polyp_root, capsys):
    (check,) = check_benchmark("rare", polyp_root())
    assert (check.found, check.complete, check.is_drawn) == (0, False, False)
    (line,) = check.lines()
    assert line.startswith("rare, test: 'rare' has no samples in split 'test' below ")


def test_rotated_images_are_listed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    mask = Image.new("L", (30, 20))
    mask.paste(255, (1, 2, 6, 5))
    for stem in ("a", "b"):
        options = {"exif": exif} if stem == "b" else {}
        Image.new("RGB", (30, 20)).save(tmp_path / f"images/{stem}.jpg", **options)
        mask.save(tmp_path / f"masks/{stem}.png")
    (tmp_path / "prompt.txt").write_text("the scratch")
    (check,) = check_benchmark("plain", tmp_path)
    assert check.complete and check.inspection.rotated == (str(tmp_path / "images/b.jpg"),)
    assert "EXIF: 1 images are rotated or mirrored" in "\n".join(check.lines())


def test_list_contains_the_suite(capsys):
    assert main(["data", "list"]) == 0
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in SUITE) and "concept-shapes" in output


def test_subcommand_is_required(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["data"])
    assert raised.value.code == 2
