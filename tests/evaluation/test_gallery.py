"""Tests of the gallery: the cases shown, the self-contained page, and escaping."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from conceptseg_hf import Reference
from conceptseg_hf.data import ConceptSample, UnreadableSampleError, load_benchmark
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.evaluation.reporting.gallery import Section, prediction_image, write_gallery, write_page

SETTINGS = {"benchmark": "mine", "protocol": "standard", "router": "adaptive"}


class Page(HTMLParser):
    """Collect the tags, sources and alternative texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources, self.alts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        self.alts += [values["alt"]] if "alt" in values else []


def a_sample(**changes) -> ConceptSample:
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[5:15, 5:15] = 255
    values = {
        "image": Image.new("RGB", (20, 20), (90, 90, 90)),
        "mask": Image.fromarray(mask),
        "prompt": "red circle",
        "level": "CI",
        "group": "diverse classes",
        "family": "attribute",
        "box": (5, 5, 15, 15),
        "sample_id": "one",
    }
    return ConceptSample(**(values | changes))


def test_shows_the_worst_and_the_median_cases(record_like, tmp_path):
    ious = [0.9, 0.1, 0.5, 1.0, 0.2, 0.6, 0.4, 0.8, 0.3, 0.7]
    records = [record_like(iou, sample_id=f"id{iou}") for iou in ious]
    write_gallery(tmp_path / "g.html", records, SETTINGS, [a_sample()] * 10, count=2)
    text = (tmp_path / "g.html").read_text()
    assert re.findall(r"id[\d.]+", text) == ["id0.1", "id0.2", "id0.5", "id0.6"]


def test_few_samples_are_shown_once(record_like, tmp_path):
    records = [record_like(0.5, sample_id=f"id{index}") for index in range(3)]
    write_gallery(tmp_path / "g.html", records, SETTINGS, [a_sample()] * 3)
    text = (tmp_path / "g.html").read_text()
    assert re.findall(r"id\d", text) == ["id0", "id1", "id2"]
    assert "None." in text


def test_images_are_embedded_and_nothing_else_is_loaded(record_like, tmp_path):
    references = [Reference(Image.new("RGB", (9, 9)), box=(1, 1, 5, 5))] * 2
    record = record_like(0.5, box=[1, 2, 10, 12])
    write_gallery(tmp_path / "g.html", [record], SETTINGS, [a_sample(references=references)])
    page = Page((tmp_path / "g.html").read_text())
    assert "script" not in page.tags and "link" not in page.tags
    assert page.alts == ["references", "ground truth", "prediction and the VLM's box"]
    for source in page.sources:
        head, _, data = source.partition(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).height == 224


def test_invalid_references_are_omitted(record_like, tmp_path):
    references = [Reference(Image.new("RGB", (9, 9)), box=(20, 20, 30, 30))]
    record = record_like(0.5, error="reference 0: box lies outside its image.")
    write_gallery(tmp_path / "g.html", [record], SETTINGS, [a_sample(references=references)])
    assert Page((tmp_path / "g.html").read_text()).alts == ["ground truth"]


def test_check_box_is_drawn_in_the_mosaic(record_like, tmp_path):
    references = [Reference(Image.new("RGB", (9, 9)), box=(1, 1, 5, 5))] * 2
    brightest = {}
    for check in (None, [1, 1, 7, 7]):
        record = record_like(0.5, check=check, check_reference=None if check is None else 0)
        write_gallery(tmp_path / "g.html", [record], SETTINGS, [a_sample(references=references)])
        page = Page((tmp_path / "g.html").read_text())
        mosaic = np.asarray(Image.open(io.BytesIO(base64.b64decode(page.sources[0].partition(",")[2]))))
        brightest[page.alts[0]] = mosaic[:110, :110].max()  # the proxy query, which is drawn without its box
    assert brightest["references"] < 60 < 120 < brightest["references and the check box"]


def test_text_is_escaped(record_like, tmp_path):
    script = "<script>alert(1)</script>\"'&"
    record = record_like(
        0.5,
        route="reasoning",
        rule=script,
        answer=script,
        sample_id=script,
        group=script,
        prompt=script,
        gt_answer=script,
    )
    write_gallery(tmp_path / "g.html", [record], SETTINGS | {"benchmark": script}, [a_sample()])
    text = (tmp_path / "g.html").read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)") == 7
    assert Page(text).tags.count("article") == 1


def test_prediction_image_shows_the_mask_of_the_record(record_like):
    sample = a_sample()
    records = record_like(1.0), record_like(0.0)
    hit, miss = (np.asarray(prediction_image(sample, record)).astype(int) for record in records)
    inside, outside = (slice(80, 140), slice(80, 140)), (slice(0, 40), slice(0, 40))
    assert np.abs(hit[inside] - miss[inside]).mean() > 20
    assert np.abs(hit[outside] - miss[outside]).mean() < 1


def test_max_references_limits_the_references_shown(record_like, tmp_path):
    references = [Reference(Image.new("RGB", (9, 9), color), box=(1, 1, 5, 5)) for color in ("red", "blue")]
    has_blue = {}
    for limit in (None, 1):
        path = tmp_path / f"{limit}.html"
        write_gallery(
            path, [record_like(0.5)], SETTINGS | {"max_references": limit}, [a_sample(references=references)]
        )
        data = Page(path.read_text()).sources[0].partition(",")[2]
        mosaic = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        has_blue[limit] = (mosaic[..., 2] > 200).any()
    assert has_blue == {None: True, 1: False}


def test_failed_and_unreadable_samples_are_reported(record_like, tmp_path):
    class Samples:
        def __getitem__(self, index):
            raise UnreadableSampleError("gone.", {"sample_id": "one"})

    records = [record_like(0.0, error="broken & sad.", route=None)]
    write_gallery(tmp_path / "g.html", records, SETTINGS, Samples())
    text = (tmp_path / "g.html").read_text()
    assert "broken &amp; sad." in text and "<img" not in text


def test_page_size_is_limited(tmp_path):
    cases = (f"<article>{'x' * 1_000_000}</article>" for _ in range(8))
    write_page(tmp_path / "g.html", "t", "s", [Section("h", "n.", cases)])
    text = (tmp_path / "g.html").read_text()
    assert len(text) < 5_000_000
    assert "4 are omitted" in text


@pytest.mark.parametrize("router", ["sam_only", "full_reasoning"])
def test_evaluate_writes_a_gallery(model, processor, tmp_path, router):
    options = {"limit": 3, "router": router, "generation_config": {"max_new_tokens": 4}}
    evaluate(model, load_benchmark("concept-shapes"), processor=processor, output_dir=tmp_path, **options)
    text = (tmp_path / "gallery.html").read_text()
    assert Page(text).tags.count("article") == 3
    assert len(text) < 5_000_000
