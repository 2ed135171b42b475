"""FiftyOne's model zoo: the copied source, an archive from a server, and FiftyOne's own operator "Apply zoo model"."""

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
NO_PROMPT = "There is no prompt; give words, or the field that holds them."


@pytest.fixture()
def installed(fo):
    """The zoo model as FiftyOne finds it."""
    import fiftyone.zoo as foz

    from conceptseg_hf.integrations.fiftyone import install_zoo_models

    install_zoo_models()
    return foz.get_zoo_model(MODEL)


def context(dataset, values, **params):
    """What the operator is given: `values` is our part of its form."""
    from fiftyone.operators.executor import ExecutionContext

    params = {"model": MODEL, "remote_params": dict(values), **params}
    return ExecutionContext({"dataset_name": dataset.name, "params": params})


def form_of(dataset, values, **params):
    """Our part of the form, and what FiftyOne holds against it."""
    import fiftyone.zoo as foz
    from fiftyone.operators import types
    from fiftyone.operators.executor import ValidationContext
    from fiftyone.operators.registry import OperatorRegistry

    ctx = context(dataset, values, **params)
    inputs = types.Object()
    inputs.add_property("remote_params", foz.get_zoo_model(MODEL).resolve_input(ctx))
    some_operator = OperatorRegistry().get_operator("@conceptseg/conceptseg/release_model")
    found = ValidationContext(ctx, types.Property(inputs), some_operator).errors
    return inputs.properties["remote_params"].type.properties, [error.reason for error in found]


def apply_as_operator(dataset, label_field, values, skip_existing=False, **arguments):
    """The calls that the operator makes for a form that was sent, in its order."""
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
    install_zoo_models()  # again: nothing breaks
    assert {"conceptseg-nano", "conceptseg-r1-7b"} <= set(foz.list_zoo_models())
    dataset = make_dataset(3)
    model = foz.load_zoo_model("conceptseg-nano", prompt="star", router="sam_only")
    assert foz.load_zoo_model("conceptseg-nano", prompt="star", router="sam_only") is model
    dataset.apply_model(model, "zoo")
    assert dataset.count("zoo") == len(dataset)


def test_the_form_offers_what_the_dataset_has(fo, installed, make_dataset):
    dataset = make_dataset(2)
    assert "label" in form_of(dataset, {"prompt": "star", "output": "detections"})[0]
    words, errors = form_of(dataset, {"prompt": "star"})
    assert list(words) == ["prompt_source", "prompt", "own_references", "router", "output"] and errors == []
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
        words, errors = form_of(bare, {"prompt": "star"})
        assert "own_references" not in words and errors == []
        _, errors = form_of(bare, {"prompt_source": "field"})
        assert errors == ["The dataset has no text field; add one that holds a prompt for each sample."]
        bare.add_sample_field("words", fo.StringField)
        own, errors = form_of(bare, {"prompt_source": "field", "prompt_field": "words"})
        assert own["prompt_field"].default == "words" and errors == []
        assert own["without_prompt"].view.label == (
            "1 of 1 samples have no text in 'words': they get an error and no mask."
        )
    finally:
        fo.delete_dataset("zoo_bare")


def test_the_form_says_what_cannot_work(fo, installed, make_dataset):
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
    ]  # of the tab that was left
    assert faults({"prompt_source": "text", "prompt": "star", "prompt_field": "gone"}) == []
    assert faults({"prompt_source": "field"}) == ["Required property"]
    [fault, _] = faults({"prompt_source": "field", "prompt_field": "nothing"})
    assert fault == "Field 'nothing' is not in the dataset; give one of its fields."
    [fault] = faults({"prompt": "star"}, label_field="Two words")
    assert fault.startswith("Field 'Two words' cannot be a field's name")
    [fault] = faults({"prompt": "star"}, label_field="ref_boxes")
    assert fault == "Field 'ref_boxes' is there already and holds no Segmentation; give another label field."
    assert faults({"prompt": "star", "output": "detections"}, label_field="ref_boxes") == []
    form, _ = form_of(dataset, {"prompt": "star"}, label_field="ground_truth")
    assert "the run will replace them" in form["overwriting"].view.label

    video = fo.Dataset("zoo_video")
    try:
        video.add_sample(fo.Sample(filepath="nothing.mp4"))
        assert form_of(video, {"prompt": "star"})[1] == [
            "These samples are of type 'video'; choose a dataset or view of images."
        ]
    finally:
        fo.delete_dataset("zoo_video")


def test_the_form_says_that_the_package_is_missing(fo, installed):
    """In a process where `conceptseg_hf` cannot be imported."""
    code = """
import sys
sys.modules["conceptseg_hf"] = None
import fiftyone.zoo as foz
print(foz.get_zoo_model("conceptseg-nano").resolve_input(None).type.properties["fault"].error_message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'conceptseg-hf[fiftyone]'" in done.stdout, done.stderr


def test_values_become_arguments(fo, installed, make_dataset):
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
    # FiftyOne keeps what was written into the form of the model that was chosen before.
    assert arguments({"prompt": "star", "classes": ["cat"]}) == {"prompt": "star"}


def test_words_for_all_as_the_operator_runs_it(fo, installed, make_dataset, tmp_path):
    from conceptseg_hf.integrations.fiftyone import get_pipeline
    from conceptseg_hf.integrations.fiftyone.schema import PREDICTION_ATTRIBUTES, REGION_ATTRIBUTES

    dataset = make_dataset(4)
    words = {"prompt_source": "text", "prompt": "star", "router": "adaptive", "output": "segmentation"}
    apply_as_operator(dataset, "zoo", words)
    apply_as_operator(
        dataset, "files", words, batch_size=3, output_dir=str(tmp_path / "masks"), num_workers=1
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
    # Declared, so that the sidebar filters by them.
    schema = dataset.get_field_schema(flat=True)
    assert {f"zoo.{name}" for name in PREDICTION_ATTRIBUTES} <= set(schema)
    assert dataset.mask_targets["zoo"] == {255: "concept"}

    apply_as_operator(
        dataset, "boxes", words | {"output": "detections"}, output_dir=str(tmp_path / "regions")
    )
    schema = set(dataset.get_field_schema(flat=True))
    assert {f"boxes.detections.{name}" for name in REGION_ATTRIBUTES} <= schema
    assert "boxes.detections.score" not in schema  # see `REGION_ATTRIBUTES`
    for sample in dataset:
        regions = fo.Segmentation(mask=sample["zoo"].mask).to_detections(mask_types="thing").detections
        found = sample["boxes"].detections
        assert {one.label for one in found} <= {"star"}
        assert np.array([one.bounding_box for one in found]) == pytest.approx(
            np.array([one.bounding_box for one in regions])
        )
        assert all(np.array_equal(one.get_mask() > 0, other.mask) for one, other in zip(found, regions))


def test_own_prompts_and_references_as_the_operator_runs_it(fo, installed, make_dataset):
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
def test_damaged_files_spoil_no_other(fo, installed, make_dataset, tmp_path, output):
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
        if output == "segmentation":  # FiftyOne wants a mask to write
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


def test_an_error_is_its_samples_own(fo, installed, make_dataset):
    dataset = make_dataset(4)
    wordless, lost, wrong, *_ = dataset.load_saved_view("targets")
    wordless["prompt"] = None
    lost["reference_ids"] = ["0" * 24]
    wrong["reference_ids"] = ["no id"]
    for sample in (wordless, lost, wrong):
        sample.save()
    apply_as_operator(dataset, "zoo", OWN, batch_size=4)
    failed = dataset.match({"zoo.error": {"$ne": None}})
    errors = dict(zip(*failed.values(["id", "zoo.error"])))
    assert errors.keys() == {wordless.id, lost.id, wrong.id}
    assert "prompt" in errors[wordless.id]
    assert all("references are not in the dataset" in errors[sample.id] for sample in (lost, wrong))


def test_a_model_remembers_no_dataset(fo, installed, make_dataset):
    import fiftyone.zoo as foz

    fields = {"prompt_field": "prompt", "reference_field": "reference_ids"}
    model = foz.load_zoo_model(MODEL, **fields)  # kept, so that FiftyOne's cache has it
    one, other = make_dataset(6), make_dataset(6)
    other.delete_sample_fields(["ground_truth", "ignore"])
    other.rename_sample_field("ref_boxes", "marks")
    other.rename_sample_field("prompt", "words")
    apply_as_operator(one, "zoo", fields)
    assert foz.load_zoo_model(MODEL, **fields) is model
    other.apply_model(model, "zoo", prompt_field="words")  # goes first, for this one run
    assert model.needs_fields == fields
    pairs = zip(one.sort_by("filepath"), other.sort_by("filepath"), strict=True)
    assert all(np.array_equal(left["zoo"].mask, right["zoo"].mask) for left, right in pairs)
    assert one.count("zoo.check_iou") == other.count("zoo.check_iou") > 0
    with pytest.raises(ValueError, match="router is 'fast'; use one of adaptive"):
        foz.load_zoo_model(MODEL, prompt="star", router="fast")


def test_predictions_mark_no_references(fo, installed, make_dataset):
    from conceptseg_hf.integrations.fiftyone.reference_samples import AUTO, resolve_label_field

    dataset = make_dataset(2)
    dataset.delete_sample_fields(["ref_boxes", "ground_truth", "ignore"])
    apply_as_operator(dataset, "zoo", OWN)
    assert dataset.count("zoo") == len(dataset)
    assert resolve_label_field(dataset, AUTO) is None


def test_released_weights_are_refused_before_they_are_downloaded(tmp_path):
    """In a process whose hub is a cache folder with the authors' config.json, and no network."""
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
    assert not (tmp_path / "weights").exists()  # where `conceptseg convert` will write


def test_other_weights_are_told_from_ours(fo, tmp_path):
    from conceptseg_hf.integrations.fiftyone import zoo

    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(ValueError, match="not in the format of conceptseg-hf; convert"):
        zoo.load_model("conceptseg-r1-7b", str(tmp_path))


def test_a_checkpoint_of_ours_loads_as_the_large_one(fo, tmp_path):
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


def test_a_source_can_be_an_archive(fo, tmp_path, monkeypatch):
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
    """The form of the official operator, driven as a person does."""

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
        """Chooses each sample's own prompt and references."""
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
        self.page.wait_for_timeout(2500)  # the form resolves what was written last
        self.modal.locator("button[aria-haspopup=menu]").click()
        self.page.get_by_role("menuitem", name=how).click()
        self.modal.get_by_role("button", name=how, exact=True).click()

    def _fill_in(self, index, text, enter):
        field = self.modal.locator("input[role=combobox]").nth(index)
        field.click()
        field.fill(text)
        if enter:
            field.press("Enter")


def test_the_official_operator_in_the_app(
    fo, installed, make_dataset, page, server, run_queued, tmp_path, request
):
    """Run it where the official plugin is: see the sentence below."""
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

    # Each sample's own prompt and references, at once, into files; one image is damaged.
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

    # Once it is mended, only that one is left to do; then all are what the plugin's own operator makes.
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

    # Attributes in the sidebar and the tooltip.
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

    # One prompt for all, on schedule, into the database.
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
