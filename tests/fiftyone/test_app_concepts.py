"""End-to-end tests of concepts in FiftyOne's App, in a browser."""

from __future__ import annotations

import re

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.heavy]


def test_induce_apply_edit_and_run_again_in_the_app(
    page, server, shadows, ids, outside, hosts_reached, tmp_path
):
    from app_driver import App, eventually
    from playwright.sync_api import expect

    from conceptseg_hf.integrations.fiftyone import concept_names, load_concept

    app = App(page, server)
    app.open(shadows.name)

    # Induce a concept from three selected samples; the form first shows that there are none.
    form = app.open_form("ConceptSeg: induce a concept", "Checkpoint")
    expect(form.get_by_text("Prompt is empty; describe the concept in a few words.")).to_be_visible()
    form.get_by_role("button", name="Cancel").click()
    for index in range(3):
        app.select(index)
    form = app.open_form("ConceptSeg: induce a concept", "Checkpoint")
    form.locator("input[type=string]").first.fill("shadow")
    expect(form.get_by_text("The concept 'shadow' will be induced from 3 samples")).to_be_visible()
    app.shot("20-induce")
    app.execute(form)
    dialog = page.locator("[data-cy=operators-prompt-view-modal]")
    expect(dialog.get_by_text("explains the references with a mean IoU of")).to_be_visible()
    stored = load_concept(shadows, "shadow")
    for value in stored.concept.scores[0].per_reference:
        expect(dialog.get_by_text(f"{value:.2f}", exact=True).first).to_be_visible()
    expect(dialog.get_by_text(stored.concept.rule, exact=True).first).to_be_visible()
    app.shot("21-induced")

    # Apply it from the dialog to all samples except for the references, which are still selected.
    dialog.get_by_role("button", name="Apply this concept").click()
    form = page.locator("[data-cy=operators-prompt-modal]")
    expect(form.get_by_text("7 samples will be segmented; reference samples are left out.")).to_be_visible()
    expect(form.get_by_text("explains the references with a mean IoU of")).to_be_visible()
    app.choose(form, "Adaptive: the concept", "Concept only")
    app.shot("22-apply")
    app.execute(form)
    expect(page.get_by_text("7 of 7 segmented").first).to_be_visible()
    page.get_by_role("button", name="Done").click()
    shadows.reload()
    assert shadows.count_values("shadow.route") == {"concept": 7, None: 3}
    [first] = set(filter(None, shadows.values("shadow.run")))

    # The panel shows the library, and edits the rule of the concept.
    app.open_panel("Concept library")
    expect(page.get_by_text("Concepts stored with the dataset: 1")).to_be_visible()
    expect(page.get_by_text(stored.concept.rule, exact=True).first).to_be_visible()
    app.shot("23-library")

    def edit(index: int, text: str) -> None:
        page.get_by_role("button", name="Edit and verify").click()
        expect(form.get_by_text("The concept is verified on 3 references.")).to_be_visible()
        app.fill(form.locator("input[type=string]").nth(index), text)
        app.shot(f"24-edit-{text}")
        app.execute(form)

    # A phrase that is wrong scores low; the dialog names the reference that it fits worst.
    edit(1, "star")
    expect(
        dialog.get_by_text(
            re.compile("so the adaptive router uses (the rule|full reasoning); reference test-0000")
        )
    ).to_be_visible()
    app.shot("25-wrong-phrase")
    page.get_by_role("button", name="Done").click()
    assert load_concept(shadows, "shadow").concept.phrases == ("star",)

    # An edited rule finds the right phrase again, and the concept runs again with the settings of its last run.
    expect(page.get_by_role("cell", name="star")).to_be_visible()  # the panel is up to date
    edit(0, "find the shadow")
    expect(
        dialog.get_by_text(f"explains the references with a mean IoU of {stored.concept.score:.2f}")
    ).to_be_visible()
    edited = load_concept(shadows, "shadow").concept
    assert (edited.phrases, edited.rule) == (("shadow",), "find the shadow")
    app.shot("26-edited-rule")
    dialog.get_by_role("button", name="Run again with this concept").click()
    expect(form.get_by_text("7 samples will be segmented; reference samples are left out.")).to_be_visible()
    expect(form.get_by_text("Concept only: fast, never reasons")).to_be_visible()
    app.shot("27-again")
    app.execute(form)
    expect(page.get_by_text("7 of 7 segmented").first).to_be_visible()
    page.get_by_role("button", name="Done").click()
    shadows.reload()
    [second] = set(filter(None, shadows.values("shadow.run")))
    assert second != first and shadows.get_run_info(second).config.concept_name == "shadow"
    assert shadows.get_run_info(second).config.router == "sam_only"

    # The library: rename, export, import and delete.
    expect(page.get_by_text("find the shadow", exact=True)).to_be_visible()

    def manage(tab: str, *texts: str) -> None:
        page.get_by_role("button", name="Manage and import").click()
        form.get_by_text(tab, exact=True).click()
        expect(form.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        for number, text in enumerate(texts):
            app.fill(form.locator("input[type=string]").nth(number), text)
        app.shot(f"28-{tab}")
        app.execute(form)
        page.get_by_role("button", name="Close").click()

    path = tmp_path / "shadow.safetensors"
    manage("Rename", "dark")
    eventually(page, lambda: concept_names(shadows) == ["dark"])
    manage("Export a file", str(path))
    eventually(page, path.is_file)
    manage("Import a file", str(path), "imported")
    eventually(page, lambda: concept_names(shadows) == ["dark", "imported"])
    expect(page.get_by_text("Concepts stored with the dataset: 2")).to_be_visible()
    page.get_by_role("cell", name="imported").first.click()
    expect(page.get_by_text("imported: 'shadow' explains the references")).to_be_visible()
    app.shot("29-two-concepts")

    # The form applies the first concept if no other is chosen.
    form = app.open_form("ConceptSeg: apply a concept", "Checkpoint")
    expect(form.get_by_text("7 samples will be segmented; reference samples are left out.")).to_be_visible()
    app.choose(form, "Adaptive: the concept", "Concept only")
    app.execute(form)
    expect(page.get_by_text("7 of 7 segmented").first).to_be_visible()
    page.get_by_role("button", name="Done").click()
    shadows.reload()
    assert shadows.distinct("dark.concept") == ["dark"]
    assert outside == [] and hosts_reached() == {"127.0.0.1"}
