"""The components of the page and their arrangement; other modules find them by their `elem_id`."""

from __future__ import annotations

import gradio as gr
from gradio.themes import Base

from .components import CheckedEditor, CheckedImage
from .examples import EXAMPLE_NAMES
from .figures import LAYERS
from .marks import BOX, MASK
from .sessions import Demo, status_html

CSS = """
.gradio-container {max-width: 1200px !important; margin: auto;
    --body-text-color-subdued: #4b5563; --block-info-text-color: #4b5563; --block-label-text-color: #374151;
    --block-title-text-color: #374151; --input-placeholder-color: #6b7280}
.dark .gradio-container, .dark.gradio-container {--body-text-color-subdued: #d1d5db; --block-info-text-color: #d1d5db;
    --block-label-text-color: #e5e7eb; --block-title-text-color: #e5e7eb; --input-placeholder-color: #9ca3af}
:focus-visible {outline: 3px solid #1d4ed8 !important; outline-offset: 2px}
.bar {position: relative; display: inline-block; width: 160px; max-width: 50%; height: 12px; background: #d4d4d8;
      border: 1px solid #52525b; vertical-align: middle}
.bar .value {position: absolute; left: 0; top: 0; bottom: 0; background: #1d4ed8}
.bar .threshold {position: absolute; top: -4px; bottom: -4px; width: 2px; background: #b91c1c}
#rationale textarea {font-family: ui-monospace, monospace; font-size: 13px}
#image img, #result img, #check img {width: 100%; height: 100%; object-fit: contain}
#result .image-container, #check .image-container {padding-top: 30px}
"""
# On a narrow screen, the results are below the inputs.
SCROLL_TO_STATUS = """(...values) => {
    const status = document.querySelector("#status");
    if (status.getBoundingClientRect().top > window.innerHeight * 0.8) status.scrollIntoView({behavior: "smooth"});
    return values;
}"""
# Fonts of the system: the page loads nothing from other servers.
THEME = Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue")


def add_inputs(demo: Demo) -> None:
    """Add the column of inputs: image, prompt, route (if there are several) and references."""
    gr.Dropdown(
        list(EXAMPLE_NAMES),
        value=None,
        label="Example",
        info="Loads an image, its prompt and its references.",
        elem_id="example",
    )
    CheckedImage(
        label="Image",
        height=280,
        sources=["upload", "clipboard"],
        elem_id="image",
        buttons=[],
        format="png",
    )
    gr.Textbox(label="Concept", placeholder="red circle, the odd one out, ...", elem_id="prompt", lines=1)
    gr.Radio(
        list(demo.routers),
        value=demo.routers[0],
        visible=len(demo.routers) > 1,
        label="Route",
        info="adaptive: SAM 3 alone if it is confident enough, otherwise reasoning.",
        elem_id="router",
    )
    with gr.Row():
        gr.Button("Segment", variant="primary", elem_id="run", min_width=120)
        gr.Button("Cancel", elem_id="cancel", min_width=120)
    with gr.Accordion("References: images that show the concept", open=False, elem_id="references"):
        CheckedEditor(
            label="Brush over the object, or draw around it",
            brush=gr.Brush(colors=["#e11d48"], default_size=14, color_mode="fixed"),
            layers=False,
            sources=["upload", "clipboard"],
            transforms=(),
            height=380,
            elem_id="editor",
            buttons=[],
        )
        gr.Radio([MASK, BOX], value=MASK, label="Use the strokes as", elem_id="kind")
        gr.Textbox(
            label="Or type a box",
            placeholder="x1, y1, x2, y2 in pixels",
            info="Used instead of the strokes.",
            elem_id="box",
        )
        with gr.Row():
            gr.Button("Add reference", elem_id="add", min_width=120)
            gr.Button("Remove all references", elem_id="clear", min_width=120)
    gr.Gallery(label="References", columns=3, height=170, interactive=False, elem_id="added", buttons=[])


def add_results(demo: Demo) -> None:
    """Add the column of results: route, text, image with layers, rule and check; for CoPRS, the prior as a layer."""
    layers = [name for name in LAYERS if name != "box"] if demo.has_prior else list(LAYERS)
    shown = ["mask", "heatmap" if demo.has_prior else "box"]
    gr.HTML(status_html("Results appear here."), elem_id="status", label="Status")
    gr.Textbox(label="What the model writes", lines=5, max_lines=12, interactive=False, elem_id="rationale")
    gr.CheckboxGroup(layers, value=shown, label="Layers", elem_id="layers")
    gr.Image(
        label="Result",
        interactive=False,
        height=340,
        elem_id="result",
        format="png",
        buttons=["fullscreen"],
    )
    gr.DownloadButton("Download the mask", interactive=False, elem_id="mask-file")
    gr.Textbox(
        label="Rule",
        visible=not demo.has_prior,
        info="Edit the rule and run again: the model then applies it instead of finding one.",
        elem_id="rule",
    )
    gr.Button("Run with this rule", elem_id="rerun", visible=not demo.has_prior)
    gr.Image(
        label="References as the model sees them" + ("" if demo.has_prior else ", and its check"),
        interactive=False,
        height=300,
        elem_id="check",
        format="png",
        buttons=["fullscreen"],
    )


def add_tabs(demo: Demo) -> None:
    """Add the tabs below: comparison of routes, and a concept for many images; CoPRS has neither."""
    with gr.Tab("Compare routes", visible=len(demo.routers) > 1):
        gr.Button("Run all routes", elem_id="compare")
        gr.Gallery(
            label="Routes", columns=3, interactive=False, height="auto", elem_id="compared", buttons=[]
        )
    with gr.Tab("Concept for many images", visible=not demo.has_prior):
        gr.Markdown(
            "Induce the concept once from the references above, then apply it to other images without reasoning."
        )
        gr.Button("Induce the concept", elem_id="induce")
        gr.Textbox(label="Concept", interactive=False, elem_id="summary")
        gr.DownloadButton("Download the concept file", interactive=False, elem_id="concept-file")
        gr.File(label="Images (select all files of a folder)", file_count="multiple", elem_id="files")
        gr.Button("Apply to these images", elem_id="apply")
        gr.Gallery(label="Masks", columns=4, interactive=False, height="auto", elem_id="applied", buttons=[])
        gr.DownloadButton("Download all masks", interactive=False, elem_id="archive")
