"""Tests of `conceptseg app` in a browser, with the embedded checkpoint."""

from __future__ import annotations

import io
import json
import re
import struct
import urllib.error
import urllib.request
import zipfile
import zlib

import numpy as np
import pytest
from page_steps import RULE_EXAMPLE, choose, expect, png, status, upload, wait_for
from PIL import Image

from conceptseg_hf.integrations.app import load_example
from conceptseg_hf.loading import load_model_and_processor

pytestmark = pytest.mark.slow


def downloaded(page, selector: str) -> bytes:
    button = page.locator(selector)
    expect(button).to_be_enabled(timeout=60_000)
    with page.expect_download() as download:
        button.click()
    return download.value.path().read_bytes()


@pytest.fixture(scope="module")
def expected():
    """The result of the example without the page."""
    model, processor = load_model_and_processor(None, "cpu")
    example = load_example(RULE_EXAMPLE)
    sample = processor.prepare(example.image, example.prompt, example.references)
    return model.segment([sample], processor=processor)[0]


def test_the_page_shows_what_segment_returns(page, outside, expected):
    choose(page, RULE_EXAMPLE)
    page.locator("#run").click()
    wait_for(page, "Route: reasoning")
    assert page.locator("#rationale textarea").input_value() == expected.completion
    assert page.locator("#rule textarea, #rule input").first.input_value() == expected.rule
    expect(status(page)).to_contain_text(f"score {expected.score:.2f}, answer: {expected.answer}")
    expect(status(page)).to_contain_text(f"{expected.check_iou:.2f}")
    mask = Image.open(io.BytesIO(downloaded(page, "#mask-file")))
    assert np.array_equal(np.asarray(mask), np.asarray(expected.mask))
    page.locator("#check img").wait_for()

    # Another layer gives another image, without another run.
    before = page.locator("#result img").get_attribute("src")
    page.get_by_label("heatmap").check()
    expect(page.locator("#result img")).not_to_have_attribute("src", before)

    # The model applies an edited rule.
    page.locator("#rule textarea, #rule input").first.fill("find the cyan square")
    page.locator("#rerun").click()
    wait_for(page, "Route: reasoning with your rule")
    assert "find the cyan square" in page.locator("#rationale textarea").input_value()
    assert outside == []


def test_routes_are_compared(page):
    choose(page, RULE_EXAMPLE)
    page.locator("#compare").click()
    wait_for(page, "3 routes finished", "#compare-status")
    expect(page.locator("#compare-status")).to_be_in_viewport()
    expect(status(page)).to_have_text("Results appear here.")
    expect(page.locator("#compared")).to_contain_text("sam_only: shortcut")
    expect(page.locator("#compared")).to_contain_text("full_reasoning: reasoning")


def test_references_are_drawn_or_typed_and_a_concept_is_applied_to_files(page):
    choose(page, "Drawing: a shadow")
    captions = page.locator("#added .caption-label")
    count = captions.count()
    page.locator("#references button").first.click()
    upload(page, "#editor", ("reference.png", png()))
    canvas = page.locator("#editor canvas").last
    canvas.wait_for()
    expect(page.get_by_text("Upload an image")).to_be_hidden()
    page.wait_for_timeout(1000)  # the editor lays out its canvas
    canvas.scroll_into_view_if_needed()
    area = canvas.bounding_box()
    page.mouse.move(area["x"] + area["width"] * 0.45, area["y"] + area["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] * 0.55, area["y"] + area["height"] * 0.5, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.locator("#add").click()
    expect(captions).to_have_count(count + 1)
    expect(captions.last).to_have_text(f"{count + 1}: mask")

    page.get_by_text("Upload an image").wait_for()
    upload(page, "#editor", ("reference.png", png()))
    expect(page.get_by_text("Upload an image")).to_be_hidden()
    page.get_by_label("Or type a box").fill("4, 4, 40, 50")
    page.locator("#add").click()
    expect(captions).to_have_count(count + 2)
    expect(captions.last).to_have_text(f"{count + 2}: box")

    choose(page, "Drawing: a shape by its looks")
    expect(page.locator("#prompt textarea, #prompt input").first).not_to_have_value("transparent")
    page.get_by_role("tab", name="Many images").click()
    page.locator("#induce").click()
    wait_for(page, "The concept is ready.", "#induce-status")
    expect(page.locator("#summary textarea, #summary input").first).to_have_value(
        re.compile("explains the references with a mean IoU"), timeout=120_000
    )
    assert b"conceptseg" in downloaded(page, "#concept-file")[:2000]
    upload(page, "#files", ("a.png", png(seed=1)), ("b.png", png(seed=2)), ("broken.png", b"not an image"))
    expect(page.locator("#files")).to_contain_text("broken", timeout=30_000)
    page.locator("#apply").click()
    wait_for(page, "3 images, 1 failed.", "#apply-status")
    expect(page.locator("#apply-status")).to_be_in_viewport()
    archive = zipfile.ZipFile(io.BytesIO(downloaded(page, "#archive")))
    assert archive.namelist() == ["0001_a_mask.png", "0002_b_mask.png", "results.json"]
    records = json.loads(archive.read("results.json"))
    assert [record["error"] is None for record in records] == [True, True, False]


def bomb() -> bytes:
    """A small PNG file whose header states 40,000 x 40,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.png", bomb(), "upload an image of at most 40 million pixels"),
        ("text.png", b"hello", "is damaged or not an image"),
        ("page.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
        ("figure.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is damaged or not an image"),
    ],
    ids=["bomb", "text", "svg", "eps"],
)
def test_hostile_uploads_are_refused_with_a_sentence(page, name, content, message):
    upload(page, "#image", (name, content))
    page.get_by_label("Concept", exact=True).first.fill("red circle")
    page.wait_for_timeout(1000)
    page.locator("#run").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text(message)
    # The page still works.
    choose(page, RULE_EXAMPLE)


def test_missing_inputs_are_reported(page):
    page.locator("#run").click()
    wait_for(page, "There is no image; drop one, or choose an example.")
    choose(page, RULE_EXAMPLE)
    page.get_by_label("Concept", exact=True).first.fill(" ")
    page.locator("#run").click()
    wait_for(page, "The concept is empty")


def test_a_run_can_be_canceled(page):
    """Noise has no rule: the embedded checkpoint writes up to the limit, which takes long."""
    upload(page, "#image", ("noise.png", png()))
    page.locator("#image img").wait_for()
    page.get_by_label("full_reasoning").check()
    prompt = page.get_by_label("Concept", exact=True).first
    prompt.fill("the odd one out")
    page.locator("#run").click()
    wait_for(page, "Running")
    expect(page.locator("#rationale textarea")).not_to_have_value("", timeout=60_000)
    page.locator("#cancel").click()
    wait_for(page, "Canceled.")
    choose(page, RULE_EXAMPLE)
    page.get_by_label("adaptive").check()
    page.locator("#run").click()
    wait_for(page, "Route: reasoning")


def test_keyboard_and_focus_order(page):
    choose(page, RULE_EXAMPLE)
    prompt = page.get_by_label("Concept", exact=True).first
    prompt.focus()
    order = []
    for _ in range(8):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.closest('[id]:not([id^=radio])')?.id ?? ''"))
    assert [name for name in dict.fromkeys(order) if name in ("router", "run", "cancel")] == [
        "router",
        "run",
        "cancel",
    ]
    prompt.focus()
    page.keyboard.press("Enter")
    wait_for(page, "Route: reasoning")


def get(url: str, **headers: str) -> tuple[int, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return response.status, dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)


def test_the_server_gives_no_other_files_and_answers_no_other_hosts(address, tmp_path):
    code, headers = get(address)
    assert code == 200
    assert headers["content-security-policy"].startswith("default-src 'self'")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, "/etc/passwd", "../../etc/passwd", "pyproject.toml"):
        assert get(f"{address}/gradio_api/file={path}")[0] in (403, 404)
    assert get(address, Host="attacker.example")[0] == 400


@pytest.mark.parametrize("path", ["/etc/hostname", "../../../../etc/hostname", "http://127.0.0.1:9/a.png"])
def test_a_request_cannot_name_other_files_as_uploads(address, path):
    """A client other than the page sends a path of the server, or an address, as its uploaded image."""
    with urllib.request.urlopen(f"{address}/config") as response:
        config = json.load(response)
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    number, inputs = next(
        (entry["id"], entry["inputs"])
        for entry in config["dependencies"]
        if entry["inputs"][:4] == [ids[name] for name in ("image", "prompt", "router", "layers")]
    )
    image = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    data = [image, "red circle", "adaptive", ["mask"], None][: len(inputs)]
    body = json.dumps({"data": data, "fn_index": number, "session_hash": "tricks"}).encode()
    join = urllib.request.Request(
        f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(join).close()
    except urllib.error.HTTPError as error:
        assert 400 <= error.code < 500
        return
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=tricks") as events:
        for line in events:
            message = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if message.get("msg") == "process_completed":
                break
    assert message["success"] is False
    assert (b"Route" in json.dumps(message["output"]).encode()) is False
