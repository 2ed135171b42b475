"""Style and scripts of the page, which run in the browser."""

from __future__ import annotations

CSS = """
.gradio-container {max-width: 1200px !important; margin: auto;
    --body-text-color-subdued: #4b5563; --block-info-text-color: #4b5563; --block-label-text-color: #374151;
    --block-title-text-color: #374151; --input-placeholder-color: #4b5563}
.dark .gradio-container, .dark.gradio-container {--body-text-color-subdued: #d1d5db; --block-info-text-color: #d1d5db;
    --block-label-text-color: #e5e7eb; --block-title-text-color: #e5e7eb; --input-placeholder-color: #d1d5db}
#image button.icon {min-width: 24px; min-height: 24px}
.dark #editor .empty div {color: #d1d5db}
.dark button[role=tab][aria-selected=true] {color: #93c5fd !important}
:focus-visible {outline: 3px solid #1d4ed8 !important; outline-offset: 2px}
.dark :focus-visible {outline-color: #93c5fd !important}
.bar {position: relative; display: inline-block; width: 160px; max-width: 50%; height: 12px; background: #d4d4d8;
      border: 1px solid #52525b; vertical-align: middle}
.bar .value {position: absolute; left: 0; top: 0; bottom: 0; background: #1d4ed8}
.bar .threshold {position: absolute; top: -4px; bottom: -4px; width: 2px; background: #b91c1c}
#rationale textarea {font-family: ui-monospace, monospace; font-size: 13px}
#image img, #result img, #check img {width: 100%; height: 100%; object-fit: contain}
#result .image-container, #check .image-container {padding-top: 30px}
"""


def scroll_to(elem_id: str, block: str) -> str:
    """Return a script that scrolls to a status that is out of view, as results are on a narrow screen.

    Args:
        elem_id: `elem_id` of the status.
        block: Where the screen then shows it: "start", "center" or "nearest".
    """
    return f"""(...values) => {{
    const status = document.querySelector("#{elem_id}"), {{top, bottom}} = status.getBoundingClientRect();
    if (top > window.innerHeight * 0.8 || bottom < 0) status.scrollIntoView({{behavior: "smooth", block: "{block}"}});
    return values;
}}"""


# Runs when the page has loaded.
# Gradio's image editor clears its canvas when its toolbar appears, and loses files that arrive earlier. They are kept
# until then. Gradio's images have no names: images and the buttons around them get the label of their component.
PREPARE_PAGE = """() => {
    const isReady = () => document.querySelector("#editor .icon-button-wrapper") !== null;
    let waiting = null;
    const deliver = () => {
        const input = document.querySelector("#editor input[type=file]");
        if (waiting === null || input === null || !isReady()) return;
        input.files = waiting;
        waiting = null;
        input.dispatchEvent(new Event("change", {bubbles: true}));
    };
    const keep = (event, files) => {
        if (!event.target.closest?.("#editor") || isReady() || !files?.length) return;
        event.preventDefault();
        event.stopImmediatePropagation();
        waiting = files;
    };
    document.addEventListener("change", event => keep(event, event.target.files), true);
    document.addEventListener("drop", event => keep(event, event.dataTransfer?.files), true);

    const names = {image: "Image", result: "Result", check: "References as the model sees them, and its check"};
    const name = () => {
        for (const [id, text] of Object.entries(names)) {
            for (const image of document.querySelectorAll(`#${id} img:not([alt="${text}"])`)) image.alt = text;
            for (const button of document.querySelectorAll(`#${id} button:has(img):not([aria-label])`)) {
                button.setAttribute("aria-label", `${text}: enlarge`);
            }
        }
    };
    let scheduled = false;
    new MutationObserver(() => {
        if (scheduled) return;
        scheduled = true;
        setTimeout(() => { scheduled = false; name(); deliver(); });
    }).observe(document.body, {childList: true, subtree: true});
    name();
}"""
