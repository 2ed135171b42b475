"""The components of the page and their arrangement; other modules find them by their `elem_id`."""

from __future__ import annotations

import gradio as gr
from gradio.themes import Base

from .components import CheckedEditor, CheckedImage
from .examples import EXAMPLE_NAMES
from .figures import LAYERS
from .marks import BOX, MASK
from .sessions import Demo, status_html

# Fonts of the system: the page loads nothing from other servers.
# Colors with a contrast of at least 4.5 to 1; Gradio's blue of buttons and tabs has 3.7.
THEME = Base(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue"
).set(
    color_accent="#1d4ed8",
    button_primary_background_fill="#1d4ed8",
    button_primary_background_fill_dark="#1d4ed8",
    button_primary_background_fill_hover="#1e40af",
    button_primary_background_fill_hover_dark="#1e40af",
)


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
    # Short names: on a narrow screen, Gradio hides tabs that do not fit behind a button without a name.
    with gr.Tab("Compare", visible=len(demo.routers) > 1):
        _add_run("Run all routes", "compare")
        gr.Gallery(
            label="Routes", columns=3, interactive=False, height="auto", elem_id="compared", buttons=[]
        )
    with gr.Tab("Many images", visible=not demo.has_prior):
        gr.Markdown(
            "Induce the concept once from the references above, then apply it to other images without reasoning."
        )
        _add_run("Induce the concept", "induce")
        gr.Textbox(label="Concept", interactive=False, elem_id="summary")
        gr.DownloadButton("Download the concept file", interactive=False, elem_id="concept-file")
        gr.File(label="Images (select all files of a folder)", file_count="multiple", elem_id="files")
        _add_run("Apply to these images", "apply")
        gr.Gallery(label="Masks", columns=4, interactive=False, height="auto", elem_id="applied", buttons=[])
        gr.DownloadButton("Download all masks", interactive=False, elem_id="archive")


def _add_run(label: str, name: str) -> None:
    """Add a button that starts a run, one that cancels it, and its status."""
    with gr.Row():
        gr.Button(label, elem_id=name, min_width=120)
        gr.Button("Cancel", elem_id=f"{name}-cancel", min_width=120)
    gr.HTML(status_html(""), elem_id=f"{name}-status", label="Status")
