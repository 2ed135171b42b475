"""Steps of the tests of the page."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

RULE_EXAMPLE = "Drawing: the rule that references share"


def choose(page, name: str) -> None:
    page.get_by_label("Example").click()
    page.get_by_role("option", name=name).click()
    page.locator("#image img").wait_for()
    page.locator("#added img").first.wait_for()
    page.wait_for_timeout(300)


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def status(page, selector: str = "#status"):
    return page.locator(f"{selector} [role=status]")


def wait_for(page, text: str | re.Pattern, selector: str = "#status") -> None:
    expect(status(page, selector)).to_contain_text(text, timeout=120_000)


def png(size: int = 96, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def upload(page, selector: str, *files: tuple[str, bytes]) -> None:
    page.locator(f"{selector} input[type=file]").first.set_input_files(
        [
            {
                "name": name,
                "mimeType": "image/png" if name.endswith(".png") else "text/plain",
                "buffer": content,
            }
            for name, content in files
        ]
    )
