"""`conceptseg app` with a CoPRS checkpoint: the prior is a layer, and nothing is shown that CoPRS does not have."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from conceptseg_hf.integrations.app import draw_layers, load_example
from conceptseg_hf.integrations.app.handlers import Handlers
from conceptseg_hf.integrations.app.sessions import Demo, Session
from conceptseg_hf.loading import load_model_and_processor
from conceptseg_hf.visualization import heatmap_overlay

EXAMPLE = "Drawing: a shape by its looks"


@pytest.fixture(scope="module")
def demo(coprs_checkpoint) -> Demo:
    return Demo(*load_model_and_processor(coprs_checkpoint, "cpu"))


@pytest.fixture(scope="module")
def expected(demo):
    """The result of the example without the page."""
    example = load_example(EXAMPLE)
    sample = demo.processor.prepare(example.image, example.prompt, example.references)
    return demo.model.segment([sample], processor=demo.processor)[0]


def test_the_heatmap_layer_is_the_prior(demo, expected) -> None:
    example, session = load_example(EXAMPLE), Session()
    session.references = list(example.references)
    *_, last = Handlers(demo).run(
        example.image, example.prompt, demo.routers[0], ("mask", "heatmap"), session
    )
    np.testing.assert_allclose(session.result.heatmap, expected.heatmap, atol=1e-5)
    shown = np.asarray(draw_layers(example.image, session.result, ("heatmap",)))
    scale = shown.shape[0] // example.image.height
    large = example.image.resize(
        (example.image.width * scale, example.image.height * scale), Image.Resampling.NEAREST
    )
    heatmap = expected.heatmap.repeat(scale, axis=0).repeat(scale, axis=1)
    drawn = np.asarray(heatmap_overlay(large, heatmap, opacity=0.75)).astype(int)
    assert np.abs(shown.astype(int) - drawn).max() <= 1
    assert np.asarray(last["result"]).shape == shown.shape
    assert last["rule"] == "" and "CoPRS reasons about every prompt" in last["status"]


def test_only_the_route_of_coprs_is_compared(demo) -> None:
    example = load_example(EXAMPLE)
    results = dict(demo.compare(Session(), example.image, example.prompt))
    assert list(results) == ["full_reasoning"] and results["full_reasoning"].route == "reasoning"


def test_rules_and_concepts_are_refused_in_a_sentence(demo) -> None:
    example, session = load_example("Drawing: a shadow"), Session()
    session.references = list(example.references)
    with pytest.raises(ValueError, match="rule is an option of ConceptSeg"):
        list(Handlers(demo).run_with_rule(example.image, example.prompt, (), "the red one", session))
    with pytest.raises(ValueError, match="applies no concepts"):
        list(Handlers(demo).induce(example.prompt, session))


@pytest.mark.slow
def test_the_page_shows_the_prior(coprs_page, outside, expected) -> None:
    from playwright.sync_api import expect

    page = coprs_page
    page.get_by_label("Example").click()
    page.get_by_role("option", name=EXAMPLE).click()
    page.locator("#image img").wait_for()
    page.wait_for_timeout(300)
    assert page.get_by_label("heatmap").is_checked() and page.get_by_label("mask", exact=True).is_checked()
    assert page.get_by_label("box", exact=True).count() == 0
    for name in ("#router", "#rule", "#rerun"):
        assert page.locator(name).count() == 0 or not page.locator(name).is_visible(), name
    for name in ("Compare", "Many images"):
        assert page.get_by_role("tab", name=name).count() == 0, name
    page.locator("#run").click()
    expect(page.locator("#status [role=status]")).to_contain_text("Route: reasoning", timeout=120_000)
    assert page.locator("#rationale textarea").input_value() == expected.completion == "<REF_POS>"

    def drawn() -> Image.Image:
        picture = page.locator("#result img")
        picture.wait_for()
        content = picture.evaluate(
            """async image => {
                const blob = await (await fetch(image.src)).blob();
                return await new Promise(done => {
                    const reader = new FileReader();
                    reader.onload = () => done(reader.result.split(",")[1]);
                    reader.readAsDataURL(blob);
                });
            }"""
        )
        return Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")

    image = load_example(EXAMPLE).image
    shown = draw_layers(image, expected, ("mask", "heatmap"))
    assert np.abs(np.asarray(drawn()).astype(int) - np.asarray(shown).astype(int)).mean() < 1
    before = page.locator("#result img").get_attribute("src")
    page.get_by_label("mask", exact=True).uncheck()
    expect(page.locator("#result img")).not_to_have_attribute("src", before)
    shown = draw_layers(image, expected, ("heatmap",))
    assert np.abs(np.asarray(drawn()).astype(int) - np.asarray(shown).astype(int)).mean() < 1
    assert outside == []
