"""End-to-end tests of the plugin in FiftyOne's App, in a browser."""

from __future__ import annotations

import re
import textwrap

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.heavy]

DATASET = "walk"


@pytest.fixture()
def app(page, server):
    from app_driver import App

    return App(page, server)


def test_load_segment_evaluate_and_explore_in_the_app(app, fo, outside, hosts_reached, request):
    from app_driver import eventually
    from playwright.sync_api import expect

    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    page = app.page
    request.addfinalizer(lambda: fo.dataset_exists(DATASET) and fo.delete_dataset(DATASET))

    # Load ConceptShapes into an empty database.
    app.open()
    page.get_by_text("browse operations").click()
    form = app.open_form("ConceptSeg: load a benchmark", "Split", browse=False)
    form.locator("input").last.fill(DATASET)
    expect(form.locator("input").last).to_have_value(DATASET)
    page.wait_for_timeout(1500)  # wait until the form has processed the input
    app.shot("1-load")
    app.execute(form)
    page.wait_for_url(re.compile(f"/datasets/{DATASET}"))
    page.get_by_role("button", name="Done").click()
    app.wait_for_grid()
    dataset = fo.load_dataset(DATASET)
    targets = dataset.load_saved_view("targets")
    assert len(targets) == 60

    # The three references of a task precede their target.
    for index in range(3):
        app.select(index)
    expect(page.get_by_text("3", exact=True).first).to_be_visible()
    app.shot("2-references")

    # Segment with the form, which first shows that the prompt is missing.
    form = app.open_form("ConceptSeg: segment a concept", "Checkpoint")
    expect(
        form.get_by_text("Prompt is empty; enter a prompt, or choose the field that contains the prompts.")
    ).to_be_visible()
    assert form.get_by_text("The selected samples (3)").count() == 1
    form.locator("input[type=string]").first.fill("the same object")
    expect(form.get_by_text("60 samples will be segmented")).to_be_visible()
    app.shot("3-form")
    app.execute(form)
    expect(page.get_by_text("60 of 60 segmented").first).to_be_visible()
    page.get_by_role("button", name="Done").click()
    dataset.reload()
    assert dataset.count("concept") == 60
    references = dataset.limit(3)
    assert references.count("concept") == 0 and set(references.values("role")) == {"reference"}
    assert set(dataset.distinct("concept.prompt")) == {"the same object"}

    # Segment again, with a prompt and references per sample.
    form = app.open_form("ConceptSeg: segment a concept", "Checkpoint")
    form.get_by_text("Prompts in a field").click()
    expect(form.get_by_text("Prompt field", exact=True)).to_be_visible()
    app.choose(form, "The selected samples", "Each sample's own (field reference_ids)")
    expect(form.get_by_text("60 samples will be segmented")).to_be_visible()
    app.execute(form)
    expect(page.get_by_text("60 of 60 segmented").first).to_be_visible()
    page.get_by_role("button", name="Done").click()
    dataset.reload()
    routes = dataset.count_values("concept.route")
    assert routes["shortcut"] > 5 and routes["reasoning"] > 20

    # The tooltip of the mask shows the rule.
    reasoned = dataset.match({"concept.rule": {"$ne": None}}).first()
    page.goto(f"{app.address}/datasets/{DATASET}?view=targets&id={reasoned.id}")
    page.locator("[data-cy=modal-looker-container]").wait_for()
    page.wait_for_timeout(2000)
    tooltip = app.hover_mask()
    expect(tooltip).to_contain_text(reasoned["concept"]["rule"])
    expect(tooltip).to_contain_text("reasoning")
    app.shot("4-tooltip")
    page.keyboard.press("Escape")

    # Evaluate.
    form = app.open_form("ConceptSeg: evaluate masks", "Protocol")
    app.execute(form)
    expect(page.get_by_text("foreground IoU:").first).to_be_visible()
    app.shot("5-evaluation")
    page.get_by_role("button", name="Close").click()
    dataset.reload()
    results = dataset.load_evaluation_results("concepts")
    metrics = {metric["key"]: metric["value"] for metric in results.custom_metrics.values()}
    assert metrics["giou"] > 50

    # The explorer shows the metrics, and the samples of a rule.
    app.open_panel("Concept explorer")
    expect(page.get_by_text("Rules and the samples they produced")).to_be_visible()
    expect(page.get_by_text(re.compile(r"foreground IoU: CI \d"))).to_be_visible()
    cells = page.locator("tr", has=page.get_by_text("all", exact=True)).last
    expect(cells).to_contain_text(f"{metrics['giou']:.1f}")
    app.shot("6-explorer")
    rules = dataset.count_values("concept.rule")
    rule, count = max(((rule, count) for rule, count in rules.items() if rule), key=lambda item: item[1])
    row = page.locator("tr", has=page.get_by_text(textwrap.shorten(rule, 44, placeholder=" …"), exact=True))
    row.scroll_into_view_if_needed()
    app.shot("7-rules")
    row.get_by_role("button").click()
    eventually(page, lambda: page.get_by_text(f"{count} samples", exact=True).count() == 1)
    app.shot("8-rule")
    widths = "table => [table.offsetWidth, table.parentElement.offsetWidth]"
    for table in page.locator("table").all():
        table_width, panel_width = table.evaluate(widths)
        assert table_width <= panel_width
    page.get_by_role("button", name="Show all samples").click()
    eventually(page, lambda: page.get_by_text(f"{len(dataset)} samples", exact=True).count() == 1)
    row.click()
    eventually(page, lambda: page.get_by_text(f"{count} samples", exact=True).count() == 1)

    # The explorer reports a mask that was replaced after the evaluation.
    list(segment_collection(dataset.select(reasoned.id), SegmentationJob(prompt="star", router="sam_only")))
    page.get_by_role("button", name="Refresh").click()
    expect(page.get_by_text("Masks replaced after the evaluation: 1; evaluate again.")).to_be_visible()

    # FiftyOne's Model Evaluation panel shows the run, too.
    app.open_panel("Model Evaluation")
    card = page.get_by_role("button", name=re.compile("Evaluation type: Segmentation concepts"))
    app.click_until(card.get_by_text("concepts", exact=True), page.get_by_text("gIoU (mean").first)
    for name in ("gIoU (mean foreground IoU) (%)", "mIoU (%)", "MAE (%)"):
        expect(page.get_by_text(name).first).to_be_visible()
    row = page.locator("tr", has=page.get_by_text("mIoU (%)", exact=True)).first
    expect(row).to_contain_text(str(metrics["miou"])[:4])  # FiftyOne rounds differently
    app.shot("9-model-evaluation")

    assert outside == [] and hosts_reached() == {"127.0.0.1"}


def test_scheduled_run_and_uncertain_samples(app, make_dataset, run_queued):
    """Schedule a run in the form, execute it with a worker, and find uncertain samples."""
    from app_driver import eventually
    from fiftyone.operators.delegated import DelegatedOperationService
    from playwright.sync_api import expect

    dataset, page = make_dataset(12), app.page
    app.open(dataset.name)
    form = app.open_form("ConceptSeg: segment a concept", "Checkpoint")
    form.get_by_text("Prompts in a field").click()
    expect(form.get_by_text("Prompt field", exact=True)).to_be_visible()
    app.choose(form, "None (prompt only)", "Each sample's own (field reference_ids)")
    expect(form.get_by_text("12 samples will be segmented")).to_be_visible()
    app.shot("10-schedule")
    app.schedule(form)
    service = DelegatedOperationService()
    eventually(page, lambda: len(service.list_operations(dataset_name=dataset.name)) == 1)
    app.shot("11-scheduled")
    run_queued(dataset)
    [operation] = service.list_operations(dataset_name=dataset.name)
    assert operation.run_state == "completed"
    dataset.reload()
    assert dataset.count("concept") == 12 and dataset.count("concept.run") == 12

    page.reload()
    app.wait_for_grid()
    form = app.open_form("ConceptSeg: find uncertain samples", "Check IoU below")
    form.get_by_role("switch").or_(form.get_by_role("checkbox")).first.click()
    expect(form.get_by_text("Routes disagree below IoU")).to_be_visible()
    app.shot("12-uncertain")
    app.execute(form)
    expect(page.get_by_text("Samples to review")).to_be_visible()
    app.shot("13-uncertain-found")
    page.get_by_role("button", name="Close").click()
    dataset.reload()
    assert dataset.count("concept_other_route") == 12
    found = dataset.match_tags("uncertain: routes disagree")
    assert 0 < len(found) < 12
    shown = dataset.match({"tags": {"$ne": []}}).count()
    eventually(page, lambda: page.get_by_text(f"{shown} samples", exact=True).count() == 1)


def test_cancelled_run_can_be_resumed_and_failure_remains_visible(app, fo, make_dataset, request):
    from app_driver import eventually
    from playwright.sync_api import expect

    dataset, page = make_dataset(60), app.page

    def open_form():
        form = app.open_form("ConceptSeg: segment a concept", "Checkpoint")
        form.locator("input[type=string]").first.fill("the same object")
        app.choose(form, "Adaptive", "Always reason")
        return form

    app.open(dataset.name)
    form = open_form()
    expect(form.get_by_text("60 samples will be segmented")).to_be_visible()
    form.locator("input[type=number]").last.fill("1")
    page.wait_for_timeout(1500)  # wait until the form has processed the input
    app.execute(form)
    expect(page.get_by_text(re.compile(r"[1-9]\d* of 60 segmented, about .* left"))).to_be_visible()
    app.shot("14-progress")
    page.get_by_role("button", name="Cancel the run").click()
    expect(page.get_by_text(re.compile(r"\d+ of 60 segmented, cancelled")).first).to_be_visible()
    app.shot("15-cancelled")
    page.get_by_role("button", name="Done").click()
    dataset.reload()
    done = dataset.count("concept")
    assert 0 < done < 60

    # The form offers to resume the run.
    form = open_form()
    expect(form.get_by_text(f"{60 - done} samples will be segmented")).to_be_visible()
    expect(form.get_by_text("Resume the interrupted run")).to_be_visible()
    app.shot("16-resume")
    form.get_by_role("button", name="Cancel").click()

    # The dialog keeps showing a failure after the notification has disappeared.
    other = fo.Dataset("someones_samples")
    request.addfinalizer(other.delete)
    other.add_sample(fo.Sample(filepath="nothing.png"))
    form = app.open_form("ConceptSeg: load a benchmark", "Split")
    form.locator("input").last.fill(other.name)
    page.wait_for_timeout(1500)
    app.execute(form)
    failed = page.locator("[data-cy=operators-prompt-view-modal]")
    expect(failed).to_contain_text(
        "Failed: dataset 'someones_samples' already exists and holds other samples"
    )
    message = page.get_by_text("Failed: dataset 'someones_samples'")
    eventually(page, lambda: message.count() == 1)  # the notification has disappeared
    expect(failed).to_contain_text("Failed: ")
    assert failed.get_by_text("of 60 samples").count() == 0
    app.shot("17-failed")
