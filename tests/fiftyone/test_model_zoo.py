"""Tests of the model zoo source, installed or from an archive, and of FiftyOne's operator "Apply zoo model"."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

MODEL = "conceptseg-nano"
OWN = {
    "prompt_source": "field",
    "prompt_field": "prompt",
    "own_references": True,
    "reference_field": "reference_ids",
}
NO_PROMPT = "Prompt is empty; enter a prompt, or choose the field that contains the prompts."


@pytest.fixture()
def installed(fo):
    """Install the model source and return the zoo model."""
    import fiftyone.zoo as foz

    from conceptseg_hf.integrations.fiftyone import install_zoo_models

    install_zoo_models()
    return foz.get_zoo_model(MODEL)


def context(dataset, values, **params):
    """Return the operator's execution context; `values` are the values of the model's inputs."""
    from fiftyone.operators.executor import ExecutionContext

    params = {"model": MODEL, "remote_params": dict(values), **params}
    return ExecutionContext({"dataset_name": dataset.name, "params": params})


def form_of(dataset, values, **params):
    """Return the model's inputs in the form, and FiftyOne's validation errors."""
    import fiftyone.zoo as foz
    from fiftyone.operators import types
    from fiftyone.operators.executor import ValidationContext
    from fiftyone.operators.registry import OperatorRegistry

    ctx = context(dataset, values, **params)
    inputs = types.Object()
    inputs.add_property("remote_params", foz.get_zoo_model(MODEL).resolve_input(ctx))
    any_operator = OperatorRegistry().get_operator("@conceptseg/conceptseg/release_model")
    errors = ValidationContext(ctx, types.Property(inputs), any_operator).errors
    return inputs.properties["remote_params"].type.properties, [error.reason for error in errors]


def apply_as_operator(dataset, label_field, values, skip_existing=False, **arguments):
    """Make the calls of the operator after its form was submitted, in the same order."""
    import fiftyone.zoo as foz

    ctx = context(dataset, values, label_field=label_field, skip_existing=skip_existing)
    samples = ctx.target_view()
    values = ctx.params["remote_params"]
    foz.get_zoo_model(MODEL).parse_parameters(ctx, values)
    model = foz.load_zoo_model(MODEL, **values)
    if skip_existing:
        samples = samples.exists(label_field, bool=False)
    arguments = {
        "confidence_thresh": None,
        "store_logits": False,
        "batch_size": None,
        "num_workers": 0,
        "skip_failures": True,
        "output_dir": None,
        "rel_dir": None,
    } | arguments
    samples.apply_model(model, label_field=label_field, **arguments)
    dataset.reload()


def masks(dataset, field):
    return {sample.id: sample[field].get_mask() for sample in dataset.exists(field).select_fields(field)}


def assert_equal_masks(one, other):
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_zoo_models_load_and_apply(fo, make_dataset):
    import fiftyone.zoo as foz

    from conceptseg_hf.integrations.fiftyone import install_zoo_models

    install_zoo_models()
    install_zoo_models()  # repeated calls are allowed
    assert {"conceptseg-nano", "conceptseg-r1-7b"} <= set(foz.list_zoo_models())
    dataset = make_dataset(3)
    model = foz.load_zoo_model("conceptseg-nano", prompt="star", router="sam_only")
    assert foz.load_zoo_model("conceptseg-nano", prompt="star", router="sam_only") is model
    dataset.apply_model(model, "zoo")
    assert dataset.count("zoo") == len(dataset)


def test_the_form_depends_on_the_fields_of_the_dataset(fo, installed, make_dataset):
    dataset = make_dataset(2)
    assert "label" in form_of(dataset, {"prompt": "star", "output": "detections"})[0]
    inputs, errors = form_of(dataset, {"prompt": "star"})
    assert list(inputs) == ["prompt_source", "prompt", "own_references", "router", "output"] and errors == []
    own, errors = form_of(dataset, OWN)
    assert list(own) == [
        *("prompt_source", "prompt_field", "own_references", "reference_field", "router", "output")
    ]
    assert errors == []
    assert {"prompt", "level"} <= set(own["prompt_field"].type.values)
    assert not {"id", "filepath", "reference_ids"} & set(own["prompt_field"].type.values)
    assert own["prompt_field"].default == "prompt"
    assert (own["reference_field"].type.values, own["reference_field"].default) == (
        ["reference_ids"],
        "reference_ids",
    )

    bare = fo.Dataset("zoo_bare")
    try:
        bare.add_sample(fo.Sample(filepath="nothing.png"))
        inputs, errors = form_of(bare, {"prompt": "star"})
        assert "own_references" not in inputs and errors == []
        _, errors = form_of(bare, {"prompt_source": "field"})
        assert errors == ["The dataset has no string field; add one with a prompt for each sample."]
        bare.add_sample_field("words", fo.StringField)
        own, errors = form_of(bare, {"prompt_source": "field", "prompt_field": "words"})
        assert own["prompt_field"].default == "words" and errors == []
        assert own["without_prompt"].view.label == (
            "1 of 1 samples have no prompt in 'words' and will get an error."
        )
    finally:
        fo.delete_dataset("zoo_bare")


def test_the_form_shows_invalid_values(fo, installed, make_dataset):
    from fiftyone.operators import types

    dataset = make_dataset(2)

    def faults(values, **params):
        form, errors = form_of(dataset, values, **params)
        if "fault" in form:
            assert isinstance(form["fault"].view, types.Warning) and form["fault"].view.label in errors
        return errors

    assert faults({}) == [NO_PROMPT]
    assert faults({"prompt": "  "}) == [NO_PROMPT]
    assert faults({"prompt_source": "text", "prompt_field": "prompt"}) == [
        NO_PROMPT
    ]  # the value of the inactive tab is ignored
    assert faults({"prompt_source": "text", "prompt": "star", "prompt_field": "gone"}) == []
    assert faults({"prompt_source": "field"}) == ["Required property"]
    [fault, _] = faults({"prompt_source": "field", "prompt_field": "nothing"})
    assert fault == "Field 'nothing' is not in the dataset; use one of its fields."
    [fault] = faults({"prompt": "star"}, label_field="Two words")
    assert fault.startswith("Field name 'Two words' is invalid")
    [fault] = faults({"prompt": "star"}, label_field="ref_boxes")
    assert fault == "Field 'ref_boxes' already exists and holds no Segmentation; use another label field."
    assert faults({"prompt": "star", "output": "detections"}, label_field="ref_boxes") == []
    form, _ = form_of(dataset, {"prompt": "star"}, label_field="ground_truth")
    assert "the run will replace them" in form["overwriting"].view.label

    video = fo.Dataset("zoo_video")
    try:
        video.add_sample(fo.Sample(filepath="nothing.mp4"))
        assert form_of(video, {"prompt": "star"})[1] == [
            "Samples have media type 'video'; choose a dataset or view of images."
        ]
    finally:
        fo.delete_dataset("zoo_video")


def test_the_form_shows_that_the_package_is_missing(fo, installed):
    """The form is created in a process that cannot import `conceptseg_hf`."""
    code = """
import sys
sys.modules["conceptseg_hf"] = None
import fiftyone.zoo as foz
print(foz.get_zoo_model("conceptseg-nano").resolve_input(None).type.properties["fault"].error_message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'conceptseg-hf[fiftyone]'" in done.stdout, done.stderr


def test_form_values_are_converted_to_arguments(fo, installed, make_dataset):
    dataset = make_dataset(2)

    def arguments(values, **params):
        ctx = context(dataset, values, label_field="zoo", **params)
        installed.parse_parameters(ctx, ctx.params["remote_params"])
        return ctx.params["remote_params"]

    both = {"prompt": "star", "prompt_field": "prompt", "reference_field": "reference_ids"}
    assert arguments(both) == both
    assert arguments(both | {"prompt_source": "text", "own_references": False}) == {"prompt": "star"}
    assert arguments(both | {"prompt_source": "field", "own_references": True}) == {
        "prompt_field": "prompt",
        "reference_field": "reference_ids",
    }
    assert arguments({"prompt": "star", "prompt_field": None, "router": ""}) == {"prompt": "star"}
    assert arguments({"prompt": "star", "label": "defect"}) == {"prompt": "star", "label": "defect"}
    # FiftyOne keeps the values of the form of the previously selected model.
    assert arguments({"prompt": "star", "classes": ["cat"]}) == {"prompt": "star"}


def test_operator_with_one_prompt_for_all(fo, installed, make_dataset, tmp_path):
    from conceptseg_hf.integrations.fiftyone import get_pipeline
    from conceptseg_hf.integrations.fiftyone.schema import PREDICTION_ATTRIBUTES, REGION_ATTRIBUTES

    dataset = make_dataset(4)
    values = {"prompt_source": "text", "prompt": "star", "router": "adaptive", "output": "segmentation"}
    apply_as_operator(dataset, "zoo", values)
    apply_as_operator(
        dataset, "files", values, batch_size=3, output_dir=str(tmp_path / "masks"), num_workers=1
    )
    assert dataset.count("zoo") == dataset.count("files") == len(dataset)
    assert_equal_masks(masks(dataset, "zoo"), masks(dataset, "files"))
    assert {Path(path).parent for path in dataset.values("files.mask_path")} == {tmp_path / "masks"}
    for sample in dataset:
        result = get_pipeline()(sample.filepath, prompt="star")
        assert np.array_equal(sample["zoo"].mask, np.asarray(result["mask"]))
        assert sample["zoo"]["route"] == result["route"]
        assert sample["zoo"]["presence"] == pytest.approx(result["presence"], abs=1e-4)
    assert set(dataset.distinct("zoo.prompt")) == {"star"}
    # The attributes are declared, so that the sidebar can filter by them.
    schema = dataset.get_field_schema(flat=True)
    assert {f"zoo.{name}" for name in PREDICTION_ATTRIBUTES} <= set(schema)
    assert dataset.mask_targets["zoo"] == {255: "concept"}

    apply_as_operator(
        dataset, "boxes", values | {"output": "detections"}, output_dir=str(tmp_path / "regions")
    )
    schema = set(dataset.get_field_schema(flat=True))
    assert {f"boxes.detections.{name}" for name in REGION_ATTRIBUTES} <= schema
    assert "boxes.detections.score" not in schema  # see `REGION_ATTRIBUTES`
    for sample in dataset:
        regions = fo.Segmentation(mask=sample["zoo"].mask).to_detections(mask_types="thing").detections
        detections = sample["boxes"].detections
        assert {detection.label for detection in detections} <= {"star"}
        assert np.array([detection.bounding_box for detection in detections]) == pytest.approx(
            np.array([region.bounding_box for region in regions])
        )
        assert all(
            np.array_equal(detection.get_mask() > 0, region.mask)
            for detection, region in zip(detections, regions)
        )


def test_operator_with_prompts_and_references_per_sample(fo, installed, make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(8)
    apply_as_operator(dataset, "zoo", OWN, batch_size=4)
    job = SegmentationJob(field="loop", prompt_field="prompt", reference_ids_field="reference_ids")
    for _ in segment_collection(dataset, job):
        pass
    dataset.reload()
    assert_equal_masks(masks(dataset, "loop"), masks(dataset, "zoo"))
    assert len(set(dataset.values("zoo.route"))) == 2
    for name in ("route", "rule", "answer", "prompt"):
        assert dataset.values(f"zoo.{name}") == dataset.values(f"loop.{name}")


@pytest.mark.parametrize("output", ["segmentation", "detections"])
def test_damaged_files_do_not_affect_other_samples(fo, installed, make_dataset, tmp_path, output):
    dataset = make_dataset(6)
    cut, empty = dataset.load_saved_view("targets").limit(2)
    contents = {Path(sample.filepath): Path(sample.filepath).read_bytes() for sample in (cut, empty)}
    Path(cut.filepath).write_bytes(contents[Path(cut.filepath)][:300])
    Path(empty.filepath).write_bytes(b"")
    values = {"prompt": "star", "output": output}
    settings = {"batch_size": 4, "output_dir": str(tmp_path)}
    try:
        apply_as_operator(dataset, "zoo", values, **settings)
        assert dataset.exists("zoo", False).values("id") == []
        assert "cannot be read" in dataset[cut.id]["zoo"]["error"]
        assert "is empty (0 bytes)" in dataset[empty.id]["zoo"]["error"]
        if output == "segmentation":  # FiftyOne requires a mask to write
            shapes = [masks(dataset, "zoo")[damaged.id].shape for damaged in (cut, empty)]
            assert shapes == [(128, 128), (1, 1)]
        good = dataset.exclude([cut.id, empty.id])
        assert set(good.values("zoo.error")) == {None} and None not in good.values("zoo.route")
        before = good.values("zoo.id")
    finally:
        for path, content in contents.items():
            path.write_bytes(content)
    apply_as_operator(dataset, "zoo", values, skip_existing=True, **settings)
    assert set(dataset.values("zoo.error")) == {None} and None not in dataset.values("zoo.route")
    assert good.values("zoo.id") == before


def test_errors_of_samples_do_not_affect_other_samples(fo, installed, make_dataset):
    dataset = make_dataset(4)
    promptless, missing, invalid, *_ = dataset.load_saved_view("targets")
    promptless["prompt"] = None
    missing["reference_ids"] = ["0" * 24]
    invalid["reference_ids"] = ["no id"]
    for sample in (promptless, missing, invalid):
        sample.save()
    apply_as_operator(dataset, "zoo", OWN, batch_size=4)
    failed = dataset.match({"zoo.error": {"$ne": None}})
    errors = dict(zip(*failed.values(["id", "zoo.error"])))
    assert errors.keys() == {promptless.id, missing.id, invalid.id}
    assert "prompt" in errors[promptless.id]
    assert all("references are not in the dataset" in errors[sample.id] for sample in (missing, invalid))


def test_a_model_can_be_applied_to_datasets_with_other_fields(fo, installed, make_dataset):
    import fiftyone.zoo as foz

    fields = {"prompt_field": "prompt", "reference_field": "reference_ids"}
    model = foz.load_zoo_model(MODEL, **fields)  # FiftyOne caches it while it is referenced
    one, other = make_dataset(6), make_dataset(6)
    other.delete_sample_fields(["ground_truth", "ignore"])
    other.rename_sample_field("ref_boxes", "marks")
    other.rename_sample_field("prompt", "words")
    apply_as_operator(one, "zoo", fields)
    assert foz.load_zoo_model(MODEL, **fields) is model
    other.apply_model(model, "zoo", prompt_field="words")  # takes precedence in this call
    assert model.needs_fields == fields
    pairs = zip(one.sort_by("filepath"), other.sort_by("filepath"), strict=True)
    assert all(np.array_equal(left["zoo"].mask, right["zoo"].mask) for left, right in pairs)
    assert one.count("zoo.check_iou") == other.count("zoo.check_iou") > 0
    with pytest.raises(ValueError, match="router is 'fast'; use one of adaptive"):
        foz.load_zoo_model(MODEL, prompt="star", router="fast")


def test_predictions_are_not_used_as_reference_labels(fo, installed, make_dataset):
    from conceptseg_hf.integrations.fiftyone.reference_samples import AUTO, resolve_label_field

    dataset = make_dataset(2)
    dataset.delete_sample_fields(["ref_boxes", "ground_truth", "ignore"])
    apply_as_operator(dataset, "zoo", OWN)
    assert dataset.count("zoo") == len(dataset)
    assert resolve_label_field(dataset, AUTO) is None


def test_released_weights_are_refused_before_they_are_downloaded(tmp_path):
    """The model is loaded in a process without network access, with the authors' config.json in the hub's cache."""
    from conceptseg_hf.integrations.fiftyone.model_zoo import SOURCE

    repo = tmp_path / "hub" / "models--zhaoyuan666--ConceptSeg-R1-7B"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repo / "snapshots" / ("0" * 40) / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    code = """
import runpy, sys
runpy.run_path(sys.argv[1])["download_model"]("conceptseg-r1-7b", sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(SOURCE / "__init__.py"), str(tmp_path / "weights")]
    offline = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert "is not in the format of conceptseg-hf; convert the released checkpoint" in done.stderr
    assert not (tmp_path / "weights").exists()  # the output folder of `conceptseg convert`


def test_checkpoint_in_another_format_raises(fo, tmp_path):
    from conceptseg_hf.integrations.fiftyone import zoo

    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(ValueError, match="not in the format of conceptseg-hf; convert"):
        zoo.load_model("conceptseg-r1-7b", str(tmp_path))


def test_converted_checkpoint_is_loaded_from_the_zoo_folder(fo, tmp_path):
    import fiftyone.zoo as foz

    from conceptseg_hf import nano_checkpoint
    from conceptseg_hf.integrations.fiftyone import install_zoo_models

    folder = install_zoo_models() / "conceptseg-r1-7b"
    shutil.copytree(nano_checkpoint(), folder, dirs_exist_ok=True)
    try:
        model = foz.load_zoo_model("conceptseg-r1-7b", prompt="star")
        assert model.checkpoint == str(folder)
    finally:
        shutil.rmtree(folder)


def test_model_source_can_be_an_archive(fo, tmp_path, monkeypatch):
    import fiftyone.zoo as foz

    from conceptseg_hf.integrations.fiftyone.model_zoo import SOURCE

    shutil.copytree(SOURCE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.make_archive(str(tmp_path / "zoo"), "zip", tmp_path / "source")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fo.config, "model_zoo_dir", str(tmp_path / "models"))
    try:
        foz.register_zoo_model_source(f"http://127.0.0.1:{server.server_port}/zoo.zip")
        model = foz.load_zoo_model("conceptseg-nano", prompt="star")
        assert type(model).__name__ == "ConceptSegFiftyOneModel"
    finally:
        server.shutdown()
        server.server_close()


class ZooForm:
    """Page object for the form of FiftyOne's operator "Apply zoo model"."""

    def __init__(self, app):
        self.app, self.page = app, app.page
        self.modal = self.page.locator("[data-cy=operators-prompt-modal]")

    def open(self, label_field):
        from playwright.sync_api import expect

        self.app.open_form("Apply zoo model", "Model")
        self._fill_in(1, MODEL, enter=False)
        self.page.get_by_role("option", name=MODEL).click()
        expect(self.modal.get_by_text("One prompt for all")).to_be_visible()
        expect(self.modal.get_by_text(NO_PROMPT)).to_be_visible()
        self._fill_in(2, label_field, enter=True)

    def own(self):
        """Select prompts and references per sample."""
        from playwright.sync_api import expect

        self.modal.get_by_text("Prompts in a field").click()
        expect(self.modal.get_by_text("Prompt field", exact=True)).to_be_visible()
        self.tick("Each sample's own references")
        expect(self.modal.get_by_text("Reference field", exact=True)).to_be_visible()

    def tick(self, label):
        box = "xpath=ancestor::*[.//input[@type='checkbox']][1]//input"
        self.modal.get_by_text(label, exact=True).locator(box).click()

    def send(self, how):
        from playwright.sync_api import expect

        expect(self.modal.get_by_text(NO_PROMPT)).to_have_count(0)
        self.page.wait_for_timeout(2500)  # wait until the form has processed the last input
        self.modal.locator("button[aria-haspopup=menu]").click()
        self.page.get_by_role("menuitem", name=how).click()
        self.modal.get_by_role("button", name=how, exact=True).click()

    def _fill_in(self, index, text, enter):
        field = self.modal.locator("input[role=combobox]").nth(index)
        field.click()
        field.fill(text)
        if enter:
            field.press("Enter")


def test_apply_zoo_model_operator_in_the_app(
    fo, installed, make_dataset, page, server, run_queued, tmp_path, request
):
    """Requires FiftyOne's zoo plugin, see the message below."""
    if "CONCEPTSEG_ZOO_PLUGIN" not in os.environ:
        pytest.skip(
            "CONCEPTSEG_ZOO_PLUGIN does not name the folder of FiftyOne's zoo plugin; get it with: fiftyone plugins "
            "download https://github.com/voxel51/fiftyone-plugins --plugin-names @voxel51/zoo"
        )
    from app_driver import App, eventually
    from playwright.sync_api import expect

    from conceptseg_hf.integrations.fiftyone import SegmentationJob, get_pipeline, segment_collection

    dataset = make_dataset(6)
    targets = dataset.load_saved_view("targets")
    damaged = targets.first()
    content = Path(damaged.filepath).read_bytes()
    request.addfinalizer(lambda: Path(damaged.filepath).write_bytes(content))
    app = App(page, server)
    form = ZooForm(app)

    def finished(field, errors):
        dataset.reload()
        done = dataset.has_field(field) and dataset.count(field) == len(dataset)
        return done and dataset.count(f"{field}.error") == errors

    # Immediate execution with prompts and references per sample and mask files; one image is damaged.
    Path(damaged.filepath).write_bytes(content[:300])
    app.open(dataset.name)
    form.open("own")
    form.own()
    form.modal.locator("input[type=number]").nth(1).fill("4")  # batch size
    form.modal.locator("input[type=text]").last.fill(str(tmp_path / "masks"))
    app.shot("zoo-1-form")
    form.send("Execute")
    eventually(page, lambda: finished("own", 1), 180)
    expect(page.get_by_text("Executing...")).to_have_count(0)
    assert "cannot be read" in dataset[damaged.id]["own"]["error"]
    assert {Path(path).parent for path in dataset.values("own.mask_path")} == {tmp_path / "masks"}

    # Restore the image: only its sample is segmented again, and all masks equal those of the segmentation loop.
    Path(damaged.filepath).write_bytes(content)
    kept = dataset.exclude([damaged.id]).values("own.id")
    form.open("own")
    form.own()
    form.tick("Skip existing")
    form.send("Execute")
    eventually(page, lambda: finished("own", 0), 180)
    expect(page.get_by_text("Executing...")).to_have_count(0)
    assert dataset.exclude([damaged.id]).values("own.id") == kept
    job = SegmentationJob(field="loop", prompt_field="prompt", reference_ids_field="reference_ids")
    for _ in segment_collection(dataset, job):
        pass
    dataset.reload()
    assert_equal_masks(masks(dataset, "loop"), masks(dataset, "own"))

    # The sidebar and the tooltip show the attributes.
    app.open(dataset.name)
    page.locator("[data-cy=checkbox-own]").click()
    page.locator("[data-cy=sidebar-field-arrow-enabled-own]").click()
    for name in ("rule", "route", "presence"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    app.shot("zoo-2-sidebar")
    reasoned = dataset.match({"role": "target", "own.rule": {"$ne": None}}).first()
    page.goto(f"{server}/datasets/{dataset.name}?id={reasoned.id}")
    page.locator("[data-cy=modal-looker-container]").wait_for()
    page.wait_for_timeout(2000)
    tooltip = app.hover_mask()
    for text in (reasoned["own"]["rule"], "reasoning"):
        expect(tooltip).to_contain_text(text)
    app.shot("zoo-3-tooltip")
    page.keyboard.press("Escape")

    # Scheduled execution with one prompt for all, with masks in the database.
    app.open(dataset.name)
    form.open("words")
    form.modal.locator("input[type=string]").first.fill("star")
    form.send("Schedule")
    expect(page.get_by_text("Operation successfully scheduled")).to_be_visible()
    run_queued(dataset)
    assert finished("words", 0)
    for sample in dataset:
        mask = get_pipeline()(sample.filepath, prompt="star")["mask"]
        assert np.array_equal(sample["words"].mask, np.asarray(mask))
