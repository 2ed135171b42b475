"""Page object for FiftyOne's App, which waits for text on the page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

SHOTS = os.environ.get("CONCEPTSEG_SCREENSHOTS")  # folder for screenshots; none are taken if it is not set
TIMEOUT_MS = 600_000  # generous, so that tests also pass on a busy machine

expect.set_options(timeout=TIMEOUT_MS)


class App:
    """One page of the App."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address

    def open(self, dataset: str | None = None) -> None:
        """Open a dataset, or the page of an empty database."""
        self.page.goto(f"{self.address}/datasets" + (f"/{dataset}" if dataset else ""))
        if dataset:
            self.wait_for_grid()
        dismiss = self.page.get_by_text("Dismiss", exact=True)
        if not dataset:
            dismiss.wait_for()
        if dismiss.count():
            dismiss.first.click()

    def wait_for_grid(self) -> None:
        """Wait for the first sample."""
        self.page.locator("[data-cy=looker]").first.wait_for(timeout=TIMEOUT_MS)

    def open_form(self, label: str, first: str, browse: bool = True) -> Locator:
        """Open an operator's form and wait for one of its texts."""
        if browse:
            self.page.keyboard.press("`")
        self.page.get_by_placeholder("Search operations by name...").fill(label)
        self.page.get_by_text(label, exact=True).click()
        form = self.page.locator("[data-cy=operators-prompt-modal]")
        expect(form.get_by_text(first, exact=True)).to_be_visible(timeout=TIMEOUT_MS)
        return form

    def choose(self, form: Locator, shown: str, option: str) -> None:
        """Select an option of a dropdown."""
        form.get_by_text(shown).click()
        self.page.get_by_role("option", name=option).click()

    def fill(self, field: Locator, text: str) -> None:
        """Fill in a text field until it keeps the text: FiftyOne resets a field while it sets the form's defaults."""
        for _ in range(20):
            field.fill(text)
            self.page.wait_for_timeout(2000)  # wait until the form has processed the input
            if field.input_value() == text:
                return
        raise AssertionError(f"the field does not keep {text!r}")

    def execute(self, form: Locator) -> None:
        """Submit the form for immediate execution."""
        form.get_by_role("button", name="Execute", exact=True).click()

    def schedule(self, form: Locator) -> None:
        """Submit the form for execution by a worker."""
        form.locator("button[aria-haspopup=menu]").last.click()
        self.page.get_by_role("menuitem", name="Schedule").click()
        form.get_by_role("button", name="Schedule", exact=True).click()

    def select(self, index: int) -> None:
        """Select a sample in the grid."""
        tile = self.page.locator("[data-cy=looker]").nth(index)
        tile.hover()
        tile.locator("[data-cy=looker-checkbox-]").click()

    def open_panel(self, name: str) -> None:
        """Open a panel next to the grid."""
        self.page.locator("[data-cy=new-panel-btn]").first.click()
        self.page.get_by_text(name, exact=True).click()

    def hover_mask(self) -> Locator:
        """Move the mouse over the open sample until the tooltip of a mask appears; return the tooltip."""
        box = self.page.locator("[data-cy=modal-looker-container]").bounding_box()
        tooltip = self.page.get_by_text("Lock tooltip").locator("xpath=ancestor::*[4]")
        for step in range(40):
            across, down = divmod(step, 8)
            self.page.mouse.move(
                box["x"] + box["width"] * (0.3 + 0.1 * across), box["y"] + box["height"] * (0.2 + 0.08 * down)
            )
            self.page.wait_for_timeout(100)
            if self.page.get_by_text("Lock tooltip").count():
                return tooltip
        raise AssertionError("no mask was found under the pointer")

    def click_until(self, button: Any, shown: Any, seconds: float = TIMEOUT_MS / 1000) -> None:
        """Click a button until `shown` is visible, as FiftyOne rerenders some buttons and can lose a click."""
        for _ in range(int(seconds / 3)):
            if shown.is_visible():
                return
            if button.is_visible():
                button.click()
            self.page.wait_for_timeout(3000)
        raise AssertionError(f"{shown} is not shown after clicks on {button}")

    def shot(self, name: str) -> None:
        """Take a screenshot if `SHOTS` is set."""
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(2500)  # wait until the grid is rendered
            self.page.screenshot(path=Path(SHOTS, f"{name}.png"))


def eventually(page: Any, condition: Any, seconds: float = TIMEOUT_MS / 1000) -> None:
    """Wait until a condition on the database or the page is true."""
    for _ in range(int(seconds * 5)):
        if condition():
            return
        page.wait_for_timeout(200)
    raise AssertionError("the condition was not met in time")
