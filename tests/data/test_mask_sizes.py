"""Ground-truth masks with a size that differs from that of their image: resized, or counted as failed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from trees import SIZE, save_image, save_mask

from conceptseg_hf import ConceptSegmentation
from conceptseg_hf.cli import main
from conceptseg_hf.data import UnreadableSampleError, check_benchmark, load_benchmark
from conceptseg_hf.evaluation import MaskMetrics, evaluate
from conceptseg_hf.evaluation.records import make_error_record, make_record
from conceptseg_hf.evaluation.records.samples import read_sample

WIDTH, HEIGHT = SIZE  # 24 x 16


def write_custom_data(root, size, box, image_size=SIZE):
    """Write two samples; the mask of the first one has a different size."""
    for stem in ("a", "b"):
        save_image(root / f"images/{stem}.png", seed=ord(stem), size=image_size)
    save_mask(root / "masks/a.png", box=box, size=size)
    save_mask(root / "masks/b.png", size=image_size)
    (root / "prompt.txt").write_text("the scratch")
    return root


@pytest.mark.parametrize(
    ("size", "image_size", "fits"),
    [
        ((25, 16), SIZE, True),  # 1 pixel
        ((23, 18), SIZE, True),  # 2 pixels
        ((24, 19), SIZE, False),  # 3 pixels
        ((12, 8), SIZE, True),  # half the size
        ((48, 32), SIZE, True),
        ((400, 300), (1000, 753), True),  # within 1 %
        ((400, 300), (1000, 759), False),
        ((30, 30), SIZE, False),
        ((16, 24), SIZE, False),  # rotated by 90 degrees
    ],
)
def test_masks_of_similar_aspect_ratio_are_resized(tmp_path, size, image_size, fits):
    box = (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2)
    root = write_custom_data(tmp_path, size, box, image_size)
    samples = load_benchmark("plain", root)
    if not fits:
        with pytest.raises(
            UnreadableSampleError, match=f"sample 'a': mask '.*a.png' has {size[0]} x {size[1]} pixels"
        ):
            samples[0]
        return
    sample = samples[0]
    assert sample.mask.size == sample.image.size == image_size and sample.stored_mask.size == size
    assert set(np.unique(np.asarray(sample.mask))) == {0, 255}, (
        "nearest-neighbor interpolation gives no soft edges"
    )
    scale_x, scale_y = image_size[0] / size[0], image_size[1] / size[1]
    expected = [box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y]
    assert np.abs(np.subtract(sample.box, expected)).max() <= 1
    assert samples[1].stored_mask is None


def full_mask(size):
    return Image.new("L", size, 255)


def test_resized_ground_truth_is_scored_at_the_image_size(tmp_path):
    sample = load_benchmark("plain", write_custom_data(tmp_path, (12, 8), (3, 2, 6, 4)))[0]
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[4:8, 6:18] = 255
    record = make_record(sample, ConceptSegmentation(Image.fromarray(mask), "x", 0.5))
    assert (record["scores"]["tp"], record["scores"]["fp"], record["scores"]["fn"]) == (24, 24, 0)
    assert (record["foreground_iou"], record["mask_resized_from"]) == (0.5, [12, 8])
    assert "mask_refused" not in record


def test_ground_truth_of_different_aspect_ratio_fails_or_is_stretched(tmp_path):
    samples = load_benchmark("plain", write_custom_data(tmp_path, (30, 30), (3, 6, 18, 21)))
    error = read_sample(samples, 0)
    record = make_error_record(error)
    assert (record["foreground_iou"], record["scores"]["tp"], record["scores"]["fn"]) == (0, 0, 15 * 15)
    assert record["present"] is True and record["mask_refused"] == [30, 30]
    assert record["error"].endswith("give a mask of the image's size.")

    stretched = read_sample(samples, 0, "paper")
    assert stretched.mask.size == SIZE and stretched.stored_mask.size == (30, 30)
    logits = np.tile(np.linspace(-1, 1, 64, dtype=np.float32), (64, 1))  # the right half
    result = ConceptSegmentation(full_mask(SIZE), "x", 0.5, mask_logits=logits)
    record = make_record(stretched, result, "paper")
    half = np.zeros((600, 600), dtype=bool)
    half[:, 300:] = True
    expected = MaskMetrics("paper").update(half, stretched.stored_mask)
    assert record["scores"] == expected, "the paper's protocol resizes the stored mask once"
    # 0.1 to 0.6 of the width, 0.2 to 0.7 of the height: a fifth of the square above and beside the half.
    assert record["scores"]["tp"] == pytest.approx(0.1 * 0.5 * 600**2, rel=0.02)
    assert record["scores"]["fn"] == pytest.approx(0.4 * 0.5 * 600**2, rel=0.02)
    assert record["mask_resized_from"] == [30, 30] and record["error"] is None


@pytest.mark.parametrize(("protocol", "resized", "failed"), [("standard", 1, 1), ("paper", 2, 0)])
def test_report_counts_resized_and_failed_masks(
    model, processor, authors_tree, tmp_path, protocol, resized, failed
):
    authors_tree.add("train", "COD10K1024", "COD", "t")
    for stem in ("a", "b", "c"):
        authors_tree.add("test", "COD10K1024", "COD", stem)
    root = authors_tree.write()
    save_mask(root / "COD10K1024/test/mask/a.png", size=(WIDTH + 1, HEIGHT))
    save_mask(root / "COD10K1024/test/mask/b.png", size=(30, 30))
    options = {"processor": processor, "router": "sam_only", "protocol": protocol}
    report = evaluate(model, "COD10K1024", root=root, output_dir=tmp_path / "out", **options)
    assert all(record["scores"] is not None for record in report.records), "every sample is scored"
    assert len(report.failed) == failed
    assert (
        f": {resized} resized to it, {failed} counted as failed (another aspect ratio)."
        in report.to_markdown()
    )
    counts = json.loads((tmp_path / "out/report.json").read_text())["gt_masks_of_another_size"]
    assert counts == {"resized": resized, "failed": failed}
    (row,) = [row for row in report.rows if row.kind == "data set"]
    assert row.samples == 3
    again = evaluate(model, "COD10K1024", root=root, output_dir=tmp_path / "out", **options)
    assert again.records == report.records


def test_data_check_compares_sizes(authors_tree, capsys):
    for split, stem in (("train", "t"), ("test", "a"), ("test", "b"), ("test", "c")):
        authors_tree.add(split, "COD10K1024", "COD", stem)
    root = authors_tree.write()
    save_mask(root / "COD10K1024/test/mask/a.png", size=(WIDTH + 1, HEIGHT))
    assert main(["data", "check", "COD10K1024", "--root", str(root), "--split", "test"]) == 1
    output = capsys.readouterr().out
    assert "ground-truth masks: 1 differ in size from their image and are resized to it" in output
    assert "a.png' has 25 x 16 pixels, but its image has 24 x 16" in output
    (check,) = check_benchmark("COD10K1024", root, "test")
    assert check.inspection.is_usable
    save_mask(root / "COD10K1024/test/mask/b.png", size=(30, 30))
    (check,) = check_benchmark("COD10K1024", root, "test")
    (fault,) = check.inspection.unusable
    assert "b.png' has 30 x 30 pixels" in fault and not check.complete and len(check.inspection.resized) == 1


@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_mask_of_the_image_before_exif_rotation_is_never_stretched(model, processor, tmp_path, protocol):
    root = write_custom_data(tmp_path / "own", (24, 16), (4, 2, 12, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(root / "images/a.png", size=(24, 16))
    Image.open(root / "images/a.png").save(root / "images/a.png", exif=exif)
    options = {"processor": processor, "root": root, "router": "sam_only", "protocol": protocol}
    report = evaluate(model, "plain", **options)
    (failed,) = report.failed
    assert "orientation 6 is applied: the mask matches the stored pixels" in failed["error"]
    assert failed["foreground_iou"] == 0 and failed["scores"]["tp"] == 0 and failed["scores"]["fn"] > 0
    Image.open(root / "masks/a.png").transpose(Image.Transpose.ROTATE_270).save(root / "masks/a.png")
    sample = load_benchmark("plain", root)[0]
    assert sample.image.size == (16, 24) and sample.box == (6, 4, 14, 12)


def test_warns_about_mirrored_images(tmp_path):
    root = write_custom_data(tmp_path, SIZE, (4, 2, 12, 10))
    exif = Image.Exif()
    exif[0x0112] = 2
    Image.open(root / "images/a.png").save(root / "images/a.png", exif=exif)
    samples = load_benchmark("plain", root)
    with pytest.warns(
        UserWarning, match=r"mask '.*a\.png' is assumed to match its image after EXIF orientation 2"
    ):
        assert samples[0].box == (4, 2, 12, 10)


def test_reference_masks_of_similar_aspect_ratio_are_resized(authors_tree):
    authors_tree.add("train", "Polyp", "Polyp", "t")
    authors_tree.add("test", "Polyp", "Polyp", "a")
    root = authors_tree.write()
    save_mask(root / "Polyp/train/mask/t.png", box=(2, 1, 6, 5), size=(12, 8))
    (sample,) = load_benchmark("Polyp", root)
    (reference,) = sample.references
    assert reference.mask.size == SIZE and sample.reference_faults == ()
    assert np.asarray(reference.mask)[2:10, 4:12].all() and np.count_nonzero(reference.mask) == 64
