"""Access to the page: contrast, names, focus, narrow screens, and files that arrive early."""

from __future__ import annotations

import base64

import pytest
from page_steps import RULE_EXAMPLE, choose, expect, png, wait_for

pytestmark = pytest.mark.slow

# Texts with a contrast below WCAG 2.2's level AA: 4.5 to 1, or 3 to 1 for large text. Disabled controls are exempt.
LOW_CONTRAST = """() => {
    const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return [...n.slice(0, 3), n[3] ?? 1]; };
    const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
    const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
    const background = element => {
        const layers = [];
        for (let e = element; e; e = e.parentElement) {
            const color = parse(getComputedStyle(e).backgroundColor);
            if (color[3] > 0) layers.unshift(color);
            if (color[3] === 1) break;
        }
        return layers.reduce((under, top) => over(top, under), [255, 255, 255]);
    };
    const isShown = element => {
        for (let e = element; e; e = e.parentElement) {
            const style = getComputedStyle(e);
            if (style.visibility === "hidden" || style.display === "none" || +style.opacity === 0) return false;
        }
        return element.getClientRects().length > 0;
    };
    const low = [];
    let count = 0;
    const check = (element, color, text) => {
        if (!text.trim() || !isShown(element) || element.closest(":disabled, script, style, noscript, svg")) return;
        count += 1;
        const under = background(element), style = getComputedStyle(element);
        const [low_, high] = [luminance(over(parse(color), under)), luminance(under)].sort((a, b) => a - b);
        const ratio = (high + 0.05) / (low_ + 0.05), size = parseFloat(style.fontSize);
        const isLarge = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
        if (ratio < (isLarge ? 3 : 4.5)) low.push(`${ratio.toFixed(2)}: ${text.trim().slice(0, 60)}`);
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode()); ) {
        check(node.parentElement, getComputedStyle(node.parentElement).color, node.textContent);
    }
    for (const field of document.querySelectorAll("textarea, input:not([type=radio], [type=checkbox], [type=file])")) {
        check(field, getComputedStyle(field).color, field.value);
        check(field, getComputedStyle(field, "::placeholder").color, field.placeholder);
    }
    return {count, low};
}"""

NAMELESS = """() => [...document.querySelectorAll("button, input:not([type=file]), textarea, select, img")]
    .filter(e => e.getClientRects().length > 0)
    .filter(e => !(e.innerText?.trim() || e.ariaLabel || e.title || e.alt || e.labels?.length
                   || e.getAttribute("aria-labelledby") || e.closest("button[aria-label]")))
    .map(e => e.outerHTML.slice(0, 160))"""

FOCUSED = """() => {
    const e = document.activeElement, style = getComputedStyle(e);
    return {
        id: e.closest("[id]:not([id^=radio], [id^=range])")?.id ?? "",
        outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
    };
}"""


def run_example(page) -> None:
    choose(page, RULE_EXAMPLE)
    page.locator("#run").click()
    wait_for(page, "Route: reasoning")


def open_everything(page) -> None:
    """Run the example, and open the references and the last tab."""
    run_example(page)
    open_the_rest(page)


def open_the_rest(page) -> None:
    page.locator("#references button").first.click()
    page.locator("#editor .empty").wait_for()
    page.get_by_role("tab", name="Many images").click()
    page.locator("#induce").wait_for()


@pytest.mark.parametrize("page", [{"color_scheme": name} for name in ("light", "dark")], indirect=True)
def test_texts_have_contrast(page, request):
    start = page.evaluate(LOW_CONTRAST)
    assert start["low"] == [] and start["count"] > 20
    open_everything(page)
    everything = page.evaluate(LOW_CONTRAST)
    assert everything["low"] == [] and everything["count"] > start["count"] + 10
    dark = "dark" in page.evaluate("document.body.className")
    assert dark == (request.node.callspec.params["page"]["color_scheme"] == "dark")


def test_low_contrast_is_found(page):
    page.evaluate("document.querySelector('#run').style = 'background: #3b82f6; transition: none'")
    assert page.evaluate(LOW_CONTRAST)["low"] == ["3.68: Segment"]


def test_controls_have_names_and_the_focus_follows_them_visibly(page):
    assert page.evaluate(NAMELESS) == []
    open_everything(page)
    expect(page.locator("#result img")).to_have_attribute("alt", "Result")
    expect(page.get_by_role("button", name="Result: enlarge")).to_be_visible()
    assert page.evaluate(NAMELESS) == []

    page.evaluate("document.querySelector('#example input').focus()")
    stops = []
    while not stops or stops[-1]["id"] != "apply-cancel":
        page.keyboard.press("Tab")
        stops.append(page.evaluate(FOCUSED))
        assert len(stops) < 100
    order = [name for name in dict.fromkeys(stop["id"] for stop in stops) if name]
    expected = ["image", "prompt", "router", "run", "cancel", "references", "editor", "kind", "box", "add"]
    expected += ["clear", "added", "layers", "result", "mask-file", "rule", "rerun", "check"]
    expected += ["induce", "induce-cancel", "files", "apply", "apply-cancel"]
    assert [name for name in order if name in expected] == expected
    assert [stop for stop in stops if stop["outline"] < 2] == []


@pytest.mark.parametrize(
    "page",
    [
        {"viewport": {"width": width, "height": 800}, "is_mobile": True, "has_touch": True}
        for width in (320, 390)
    ],
    indirect=True,
    ids=["320", "390"],
)
def test_phone(page):
    """Nothing is wider than the screen, the status is visible after a run, and buttons are large enough."""
    run_example(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(page.locator("#status")).to_be_in_viewport()
    open_the_rest(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = """() => [...document.querySelectorAll(".gradio-container button, .gradio-container [role=tab]")]
        .filter(e => e.getClientRects().length > 0 && e.tabIndex >= 0 && !e.closest("#editor, .icon-button-wrapper"))
        .filter(e => e.getBoundingClientRect().height < 24)
        .map(e => e.outerHTML.slice(0, 160))"""
    assert page.evaluate(small) == []


# Sends a file to the editor at the moment at which its file input exists, which is before it can show an image.
EARLY = """([content, event]) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
    transfer.items.add(new File([bytes], "early.png", {type: "image/png"}));
    new MutationObserver((_, observer) => {
        const input = document.querySelector("#editor input[type=file]");
        if (input === null) return;
        observer.disconnect();
        window.wasReady = document.querySelector("#editor .icon-button-wrapper") !== null;
        if (event === "drop") {
            const options = {bubbles: true, cancelable: true, dataTransfer: transfer};
            input.parentElement.dispatchEvent(new DragEvent("drop", options));
        } else {
            input.files = transfer.files;
            input.dispatchEvent(new Event("change", {bubbles: true}));
        }
        window.sent = true;
    }).observe(document.body, {childList: true, subtree: true});
}"""


@pytest.mark.parametrize("event", ["change", "drop"])
def test_the_editor_shows_files_that_arrive_before_it_is_ready(page, event):
    page.evaluate(EARLY, [base64.b64encode(png()).decode(), event])
    page.locator("#references button").first.click()
    page.wait_for_function("window.sent === true")
    assert page.evaluate("window.wasReady") is False
    page.locator("#editor .icon-button-wrapper").first.wait_for()
    expect(page.locator("#editor .empty")).to_have_count(0)
    page.get_by_label("Or type a box").fill("4, 4, 40, 50")
    page.locator("#add").click()
    expect(page.locator("#added .caption-label")).to_have_text(["1: box"])
