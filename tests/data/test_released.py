"""`conceptseg evaluate --profile released` on small trees in the published layouts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from trees import SIZE, save_image

from conceptseg_hf import cli

TEMPLATE = """
system: 'Short. '
frame: '{question} {ref_bboxes}'
slots:
  with_proxy: {ref_bboxes: 'at {reference_box_list}'}
  support_only: {ref_bboxes: ''}
  single_reference: {ref_bboxes: ''}
  no_reference: {ref_bboxes: ''}
"""


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory):
    """A checkpoint with the paper's template, which the profile replaces."""
    from conceptseg_hf.prompt_template import OFFICIAL_TEMPLATE

    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.with_settings(prompt_template=OFFICIAL_TEMPLATE).save_pretrained(folder)
    return str(folder)


@pytest.fixture()
def root(authors_tree):
    """Colon Polyp and ESDIs-SOD in the authors' layout, and one item with listed references."""
    for number in range(3):
        authors_tree.add("train", "Polyp", "Polyp", f"train_{number}")
        authors_tree.add("train", "ESDIDefects", "scratch", f"train_{number}")
    authors_tree.add("test", "Polyp", "Polyp", "test_0")
    authors_tree.add("test", "ESDIDefects", "scratch", "test_0")
    images = [f"MIG-Bench/images/diff/case_{number}.png" for number in (1, 2, 3)]
    authors_tree.add("test", "MIG_diff", "diff", "x", img_path=images, problem="What is new?")
    return authors_tree.write()


def save_reasonseg(root) -> None:
    datasets = pytest.importorskip("datasets")
    mask = np.zeros(SIZE[::-1], dtype=bool)
    mask[2:6, 3:9] = True
    image = Image.open(save_image(root / "a.png"))
    row = {"image": image, "text": "the thing", "mask": mask.tolist(), "image_id": "a", "ann_id": "0"}
    row |= {"img_height": SIZE[1], "img_width": SIZE[0]}
    folder = root / "ReasonSeg_val/data"
    folder.mkdir(parents=True)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "mask": datasets.List(datasets.List(datasets.Value("bool"))),
            **dict.fromkeys(("image_id", "ann_id"), datasets.Value("string")),
            **dict.fromkeys(("img_height", "img_width"), datasets.Value("int64")),
        }
    )
    datasets.Dataset.from_list([row], features=features).to_parquet(folder / "test-00000-of-00001.parquet")


def evaluate(checkpoint, root, out, *options):
    arguments = ("--benchmark", "Polyp,ESDIDefects,MIG_diff", "--root", str(root), "--model", checkpoint)
    return cli.main(["evaluate", *arguments, "--router", "sam_only", "--output-dir", str(out), *options])


def test_paper_results_are_listed_only_under_the_released_profile(checkpoint, root, tmp_path, capsys):
    assert evaluate(checkpoint, root, tmp_path / "out", "--profile", "released") == 0
    captured = capsys.readouterr()
    assert "profile released: " in captured.err and "mosaic.grid 2" in captured.err
    text = (tmp_path / "out/report.md").read_text()
    first = text.splitlines()[0]
    assert "protocol released" in first and "profile released" in first
    assert "ConceptSeg-R1-7B (Table 8)" in text and "ConceptSeg-R1-7B (Table 1)" in text
    assert "the released structure and the paper's wording" in text
    settings = json.loads((tmp_path / "out/Polyp-test/settings.json").read_text())
    assert (settings["profile"], settings["protocol"], settings["loader"]) == ("released",) * 3
    assert settings["mosaic"]["boxes_from"] == "cell"
    content = json.loads((tmp_path / "out/report.json").read_text())
    assert content["provenance"]["profile"] == "released"

    assert evaluate(checkpoint, root, tmp_path / "default", "--protocol", "paper") == 0
    text = (tmp_path / "default/report.md").read_text()
    assert "this run under profile paper and protocol paper; they are not comparable" in text
    assert "(Table 8)" not in text and "profile" not in text.splitlines()[0]


def test_prompt_template_from_a_file(checkpoint, root, tmp_path, capsys):
    (tmp_path / "template.yaml").write_text(TEMPLATE)
    options = ("--profile", "released", "--prompt-template", str(tmp_path / "template.yaml"))
    assert evaluate(checkpoint, root, tmp_path / "out", *options) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "profile released" in text.splitlines()[0] and "the paper's wording" not in text
    (tmp_path / "broken.yaml").write_text("frame: 3")
    assert evaluate(checkpoint, root, tmp_path / "o", "--prompt-template", str(tmp_path / "broken.yaml")) == 2
    assert "broken.yaml': prompt template: no frame" in capsys.readouterr().err
    assert evaluate(checkpoint, root, tmp_path / "o", "--prompt-template", "missing.yaml") == 2


def test_table_3_is_listed_only_under_the_released_profile(checkpoint, tmp_path):
    save_reasonseg(tmp_path / "root")
    benchmark = ("--benchmark", "reasonseg-hf", "--split", "val", "--root", str(tmp_path / "root"))
    options = ("--model", checkpoint, "--router", "sam_only", "--metrics", "giou,ciou")
    for out, profile in (("released", ("--profile", "released")), ("default", ())):
        assert (
            cli.main(["evaluate", *benchmark, *options, "--output-dir", str(tmp_path / out), *profile]) == 0
        )
    text = (tmp_path / "released/report.md").read_text()
    assert "ConceptSeg-R1-7B (Table 3)" in text
    records = [json.loads(line) for line in (tmp_path / "released/records.jsonl").read_text().splitlines()]
    scores = records[0]["scores"]
    assert sum(scores[name] for name in ("tp", "fp", "fn", "tn")) == SIZE[0] * SIZE[1]
    assert "(Table 3)" not in (tmp_path / "default/report.md").read_text()
