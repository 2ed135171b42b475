"""Drives the App as a person does; what it waits for are texts on the page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

SHOTS = os.environ.get("CONCEPTSEG_SCREENSHOTS")  # a folder; pictures are only taken when it is named
PATIENCE = 600_000  # ms after which what a page should show has failed to come, on however busy a machine

expect.set_options(timeout=PATIENCE)


class App:
    """One page of the App."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address

    def open(self, dataset: str | None = None) -> None:
        """Opens a dataset, or the page of an empty database."""
        self.page.goto(f"{self.address}/datasets" + (f"/{dataset}" if dataset else ""))
        if dataset:
            self.wait_for_grid()
        dismiss = self.page.get_by_text("Dismiss", exact=True)
        if not dataset:
            dismiss.wait_for()
        if dismiss.count():
            dismiss.first.click()

    def wait_for_grid(self) -> None:
        """Waits for the first sample."""
        self.page.locator("[data-cy=looker]").first.wait_for(timeout=PATIENCE)

    def open_form(self, label: str, first: str, browse: bool = True) -> Locator:
        """Opens an operator's form and waits for a text of it."""
        if browse:
            self.page.keyboard.press("`")
        self.page.get_by_placeholder("Search operations by name...").fill(label)
        self.page.get_by_text(label, exact=True).click()
        form = self.page.locator("[data-cy=operators-prompt-modal]")
        expect(form.get_by_text(first, exact=True)).to_be_visible(timeout=PATIENCE)
        return form

    def choose(self, form: Locator, shown: str, option: str) -> None:
        """Changes a dropdown."""
        form.get_by_text(shown).click()
        self.page.get_by_role("option", name=option).click()

    def execute(self, form: Locator) -> None:
        """Sends the form."""
        form.get_by_role("button", name="Execute", exact=True).click()

    def schedule(self, form: Locator) -> None:
        """Sends the form to a worker."""
        form.locator("button[aria-haspopup=menu]").last.click()
        self.page.get_by_role("menuitem", name="Schedule").click()
        form.get_by_role("button", name="Schedule", exact=True).click()

    def select(self, index: int) -> None:
        """Selects a sample of the grid."""
        tile = self.page.locator("[data-cy=looker]").nth(index)
        tile.hover()
        tile.locator("[data-cy=looker-checkbox-]").click()

    def open_panel(self, name: str) -> None:
        """Opens a panel beside the grid."""
        self.page.locator("[data-cy=new-panel-btn]").first.click()
        self.page.get_by_text(name, exact=True).click()

    def hover_mask(self) -> Locator:
        """Moves over the middle of the open sample until its tooltip shows; returns the tooltip."""
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

    def click_until(self, button: Any, shown: Any, seconds: float = PATIENCE / 1000) -> None:
        """Clicks until something is shown: FiftyOne draws some buttons anew once they are there, and loses a click."""
        for _ in range(int(seconds / 3)):
            if shown.is_visible():
                return
            if button.is_visible():
                button.click()
            self.page.wait_for_timeout(3000)
        raise AssertionError(f"{shown} is not shown after clicks on {button}")

    def shot(self, name: str) -> None:
        """Takes a picture, if they are wanted."""
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(2500)  # the grid draws itself anew
            self.page.screenshot(path=Path(SHOTS, f"{name}.png"))


def eventually(page: Any, question: Any, seconds: float = PATIENCE / 1000) -> None:
    """Waits until a question about the database or page is answered with yes."""
    for _ in range(int(seconds * 5)):
        if question():
            return
        page.wait_for_timeout(200)
    raise AssertionError("it did not happen in time")
