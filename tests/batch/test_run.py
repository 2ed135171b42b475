"""Batch jobs in this process: rows, bad files, resuming, other formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conceptseg_hf import ConceptPrompt, ConceptSegmentationPipeline, Reference
from conceptseg_hf.batch import BatchJob, BatchResult, open_images, run_batch
from conceptseg_hf.batch.job import read_references
from conceptseg_hf.batch.output import open_output
from conceptseg_hf.evaluation.records.rle import decode_mask
from conceptseg_hf.loading import load_model_and_processor

from .conftest import content, draw


def rows(folder: Path) -> list[dict]:
    return pq.read_table(folder / "results").to_pylist()


class StopError(Exception):
    pass


def stop(result: BatchResult) -> None:
    if result.errors:
        raise StopError


def test_rows_are_the_results_of_the_pipeline(make_images, make_job, concept, tmp_path):
    images, out = make_images(7), tmp_path / "out"
    report = run_batch(make_job(images), out)
    assert (report.images, report.computed, report.errors, dict(report.routes)) == (7, 7, 0, {"concept": 7})
    assert {path.name for path in out.iterdir()} == {"results", "settings.json"}
    assert sorted(path.name for path in (out / "results").iterdir()) == ["00000.parquet", "00001.parquet"]
    pipe = ConceptSegmentationPipeline(
        *load_model_and_processor()[:1], processor=load_model_and_processor()[1]
    )
    found = rows(out)
    assert [row["index"] for row in found] == list(range(7))
    assert [row["image"] for row in found] == [f"{number:03d}.png" for number in range(7)]
    for start in range(0, 7, 3):  # the batches of the job
        paths = [images / row["image"] for row in found[start : start + 3]]
        expected = pipe(paths, concept=concept, batch_size=3)
        for row, result in zip(found[start : start + 3], expected):
            mask = np.asarray(result["mask"]) > 0
            assert np.array_equal(decode_mask(row["mask"]), mask) and row["mask_area"] == mask.sum()
            assert (row["width"], row["height"]) == (48, 40)
            for name in ("label", "route", "score", "presence", "threshold", "rule", "completion", "error"):
                assert row[name] == result[name], name
            if mask.any():
                (ys, xs) = np.nonzero(mask)
                assert row["mask_box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            else:
                assert row["mask_box"] is None


def test_prompt_and_references_reach_the_vlm(make_images, make_job, tmp_path):
    references = read_references([Reference(draw(90), box=(2, 2, 30, 30)), Reference(draw(91))])
    changes = {"concept": None, "prompt": "the odd one out", "references": references}
    job = make_job(make_images(2), router="full_reasoning", max_new_tokens=40, **changes)
    run_batch(job, tmp_path / "out")
    model, processor = load_model_and_processor()
    samples = [processor.prepare(draw(number), job.text, references, lazy=True) for number in range(2)]
    expected = model.segment(samples, "full_reasoning", {"max_new_tokens": 40}, processor=processor)
    for row, result in zip(rows(tmp_path / "out"), expected):
        assert row["route"] == "reasoning" and row["completion"] == result.completion
        assert row["box"] == (None if result.box is None else list(result.box))


def test_bad_files_are_rows_with_a_sentence(make_images, make_job, tmp_path):
    images = make_images(8, damaged=(1, 4))
    (images / "003.png").write_bytes(b"<html>not found</html>")
    (images / "005.png").write_bytes(b"")
    lines = []
    report = run_batch(
        make_job(images), tmp_path / "out", on_batch=lambda result: lines.extend(result.errors)
    )
    assert report.errors == 4 and report.routes["concept"] == 4
    assert [name for name, _ in lines] == ["001.png", "003.png", "004.png", "005.png"]
    found = rows(tmp_path / "out")
    assert [row["index"] for row in found if row["error"]] == [1, 3, 4, 5]
    assert found[3]["error"] == (
        f"image {str(images / '003.png')!r} is a web page and not an image; download the image itself."
    )
    for index in (1, 3, 4, 5):
        assert found[index]["mask"] is found[index]["route"] is found[index]["width"] is None
        assert found[index]["error"].count(". ") == 0 and found[index]["error"].endswith(".")
    assert report.first_error == f"001.png: {found[1]['error']}"


def test_stopped_job_continues_with_what_is_missing(make_images, make_job, tmp_path):
    images = make_images(14, damaged=(10,))  # in the fourth of five batches
    run_batch(make_job(images), tmp_path / "whole")
    with pytest.raises(StopError):
        run_batch(make_job(images), tmp_path / "out", on_batch=stop)
    assert sorted(path.name for path in (tmp_path / "out").glob("*/*")) == ["00000.parquet", "00001.parquet"]
    report = run_batch(make_job(images), tmp_path / "out")
    assert report.computed == 2 and content(tmp_path / "out") == content(tmp_path / "whole")
    before = content(tmp_path / "out")
    assert run_batch(make_job(images), tmp_path / "out").computed == 0
    assert content(tmp_path / "out") == before


def test_leftovers_of_killed_processes(make_images, make_job, tmp_path):
    """Temporary files, a cut batch, a batch that was merged already, and a complete shard that was not merged."""
    images, out = make_images(14), tmp_path / "out"
    run_batch(make_job(images), tmp_path / "whole")
    run_batch(make_job(images), out)
    unfinished = out / "unfinished"
    unfinished.mkdir()
    shard = pq.read_table(out / "results" / "00001.parquet")
    for batch in range(2):
        pq.write_table(shard.slice(3 * batch, 3), unfinished / f"{batch + 2:08d}.parquet")
    (out / "results" / "00001.parquet").unlink()
    (out / "results" / "00002.parquet").unlink()
    (unfinished / "00000000.parquet").write_bytes(b"merged before")
    (unfinished / "00000004.parquet").write_bytes((out / "results" / "00000.parquet").read_bytes()[:300])
    (out / "results" / ".0123456789abcdef.tmp").write_bytes(b"x")
    (unfinished / ".0123456789abcdef.tmp").write_bytes(b"x")
    report = run_batch(make_job(images), out)
    assert report.computed == 2 and content(out) == content(tmp_path / "whole")


def test_failed_images_can_be_tried_again(make_images, make_job, tmp_path):
    images, out = make_images(14, damaged=(1, 13)), tmp_path / "out"
    run_batch(make_job(images), out)
    draw(1).save(images / "001.png")
    draw(13).save(images / "013.png")
    assert run_batch(make_job(images), out).errors == 2
    report = run_batch(make_job(images), out, retry_failed=True)
    assert (report.computed, report.errors) == (5, 0)  # the batches of the two images
    run_batch(make_job(images), tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


CHANGES = {
    "concept": {"concept": ConceptPrompt("the square", ("blue square",))},
    "prompt": {"prompt": "another"},
    "router": {"router": "sam_only"},
    "generation": {"max_new_tokens": 5},
    "batch_size": {"batch_size": 4},
    "batches_per_shard": {"batches_per_shard": 9},
    "dtype": {"dtype": "bfloat16"},
    "configuration": {"profile": "released"},
    "references": {"references": (Reference(draw(0)),)},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, concept):
    folder = tmp_path_factory.mktemp("finished")
    draw(0).save(folder / "a.png")
    job = BatchJob(open_images([str(folder / "a.png")]), concept=concept, batch_size=3, batches_per_shard=2)
    run_batch(job, folder / "out")
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused(finished, concept, name):
    fields = {"concept": concept, "batch_size": 3, "batches_per_shard": 2, **CHANGES[name]}
    job = BatchJob(open_images([str(finished / "a.png")]), **fields)
    with pytest.raises(
        ValueError, match=rf"holds the results of another job \(different .*{name}.*\); give"
    ) as caught:
        run_batch(job, finished / "out")
    assert "\n" not in str(caught.value)


def test_other_weights_and_other_images_are_refused(finished, concept, tmp_path):
    model, processor = load_model_and_processor()
    next(model.vlm.parameters()).data[0] += 1
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    fields = {"concept": concept, "batch_size": 3, "batches_per_shard": 2}
    with pytest.raises(ValueError, match=r"\(different weights\)"):
        job = BatchJob(open_images([str(finished / "a.png")]), model=tmp_path / "m", **fields)
        run_batch(job, finished / "out")
    with pytest.raises(ValueError, match=r"\(different images\)"):
        run_batch(BatchJob(open_images(["b.png"]), **fields), finished / "out")
    damaged = finished / "out" / "results" / "00000.parquet"
    kept = damaged.read_bytes()
    damaged.write_bytes(kept[:-20])
    try:
        with pytest.raises(
            ValueError, match=r"00000\.parquet' is damaged or was not written by this job; remove"
        ):
            run_batch(BatchJob(open_images([str(finished / "a.png")]), **fields), finished / "out")
    finally:
        damaged.write_bytes(kept)


def test_concept_of_other_weights_is_refused_and_a_full_folder_too(make_images, make_job, tmp_path):
    other = ConceptPrompt("x", ("x",), score=0.9, model_hash="0" * 16)
    with pytest.raises(ValueError, match="made with other weights"):
        run_batch(make_job(make_images(1), concept=other), tmp_path / "out")
    (tmp_path / "out" / "settings.json").unlink()
    (tmp_path / "out" / "results").mkdir()
    (tmp_path / "out" / "results" / "x").touch()
    with pytest.raises(ValueError, match=r"holds results without settings\.json"):
        run_batch(make_job(tmp_path / "images"), tmp_path / "out")


def test_second_job_in_a_folder_is_refused(make_images, make_job, tmp_path):
    pytest.importorskip("fcntl")
    job = make_job(make_images(1))
    with open_output(tmp_path / "out", job), pytest.raises(ValueError, match="another job is writing to"):
        run_batch(job, tmp_path / "out")
    assert run_batch(job, tmp_path / "out").computed == 1


def test_coco_is_readable_by_pycocotools(make_images, make_job, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    images, out = make_images(5, damaged=(2,)), tmp_path / "out"
    report = run_batch(make_job(images), out, format="coco")
    assert report.outputs == (out / "results", out / "coco.json")
    read = coco.COCO(out / "coco.json")
    assert [image["file_name"] for image in read.loadImgs(read.getImgIds())] == [
        f"00{i}.png" for i in range(5)
    ]
    assert read.loadCats([1])[0]["name"] == "the square" and "error" in read.loadImgs([2])[0]
    found = {row["index"]: row for row in rows(out) if row["mask_box"]}
    annotations = read.loadAnns(read.getAnnIds())
    assert [each["image_id"] for each in annotations] == list(found) != []
    for each in annotations:
        mask = read.annToMask(each) > 0
        assert (
            np.array_equal(mask, decode_mask(found[each["image_id"]]["mask"])) and each["area"] == mask.sum()
        )
        x, y, width, height = map(int, each["bbox"])
        assert mask[y : y + height, x : x + width].sum() == mask.sum()


def test_png_files_are_the_masks(make_images, make_job, tmp_path):
    images, out = make_images(4, damaged=(2,)), tmp_path / "out"
    draw(9).save(images / "sub dir é.png")
    run_batch(make_job(images), out)
    assert run_batch(make_job(images), out, format="png").computed == 0
    names = ["00000000-000.png", "00000001-001.png", "00000003-003.png", "00000004-sub_dir_é.png"]
    assert sorted(path.name for path in (out / "masks" / "00000").iterdir()) == names
    for row in rows(out):
        if row["mask"] is not None:
            path = next((out / "masks" / "00000").glob(f"{row['index']:08d}-*"))
            assert np.array_equal(np.asarray(Image.open(path)) > 0, decode_mask(row["mask"]))


def test_names_that_are_not_unicode(make_images, make_job, tmp_path):
    images = make_images(1)
    try:
        draw(3).save(images / "caf\udce9.png")
    except OSError:
        pytest.skip("the file system accepts only Unicode names")
    run_batch(make_job(images), tmp_path / "out", format="coco")
    assert [row["image"] for row in rows(tmp_path / "out")] == ["000.png", "caf\\udce9.png"]
    assert len(json.loads((tmp_path / "out" / "coco.json").read_text())["images"]) == 2


def test_job_without_words_or_with_wrong_numbers():
    images = open_images(["a.png"])
    for changes, message in (
        ({}, "neither a prompt nor a concept"),
        ({"prompt": " "}, "neither a prompt nor a concept"),
        ({"prompt": "x", "batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchJob(images, **changes)
    with pytest.raises(ValueError, match="engine is 'slurm'"):
        run_batch(BatchJob(images, prompt="x"), "out", engine="slurm")


def test_report_is_a_table(make_images, make_job, tmp_path):
    report = run_batch(make_job(make_images(8, damaged=(0,))), tmp_path / "out")
    table = [line.split() for line in report.to_table().splitlines()]
    assert table[:3] == [["images", "8"], ["concept", "7", "87.5%"], ["errors", "1", "12.5%"]]
    assert table[3][0] == "images/s" and len(table) == 4
    again = run_batch(make_job(tmp_path / "images"), tmp_path / "out")
    assert [line.split() for line in again.to_table().splitlines()] == table[:3]
