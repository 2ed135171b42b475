"""Tests of the parts of the demo that need no browser."""

from __future__ import annotations

import io
import json
import socket
import zipfile

import numpy as np
import pytest
from PIL import Image

from conceptseg_hf import (
    ConceptSegForSegmentation,
    ConceptSegmentation,
    ConceptSegProcessor,
    Reference,
    nano_checkpoint,
)
from conceptseg_hf.integrations.app import (
    BOX,
    MASK,
    ImageOutcome,
    UploadError,
    draw_layers,
    mark_reference,
    parse_box,
    read_upload,
    segment_images,
    uploads,
    write_archive,
)
from conceptseg_hf.integrations.app.handlers import Handlers
from conceptseg_hf.integrations.app.server import find_port
from conceptseg_hf.integrations.app.sessions import Canceled, Demo, Session, describe_route


def content_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def strokes(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (60, 40)) -> Image.Image:
    layer = np.zeros((size[1], size[0], 4), dtype=np.uint8)
    for x1, y1, x2, y2 in boxes:
        layer[y1:y2, x1:x2] = (225, 29, 72, 255)
    return Image.fromarray(layer)


def test_uploads_are_read_with_their_rotation(tmp_path):
    image = Image.new("RGB", (30, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    image.save(path, exif=exif)
    assert read_upload(path).size == (20, 30)
    assert read_upload(content_of(Image.new("RGBA", (8, 9))), rgb=False).mode == "RGBA"


def test_large_uploads_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(uploads, "MAX_PIXELS", 99)
    with pytest.raises(UploadError, match="has 10 x 10 pixels; upload an image of at most"):
        read_upload(content_of(Image.new("L", (10, 10))))
    assert read_upload(content_of(Image.new("L", (9, 11)))).size == (9, 11)
    monkeypatch.setattr(uploads, "MAX_BYTES", 2**20)
    path = tmp_path / "large.png"
    path.write_bytes(b"\x89PNG" + bytes(2**20))
    with pytest.raises(UploadError, match=r"'large.png' has 1 MB; upload an image of at most 1 MB."):
        read_upload(path)


def test_formats_that_run_programs_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UploadError, match="upload a file of type PNG, JPEG"):
        read_upload(content_of(Image.new("RGB", (5, 5)), "EPS"))
    with pytest.raises(UploadError, match="damaged"):
        read_upload(content_of(Image.effect_noise((90, 90), 80))[:2000])
    with pytest.raises(UploadError, match=r"'absent\.png' cannot be read"):
        read_upload(tmp_path / "absent.png")
    with pytest.raises(UploadError, match="cannot be read"):
        read_upload("http://127.0.0.1:9/a.png")


def test_strokes_are_masks_or_boxes():
    image = Image.new("RGB", (60, 40))
    layers = [strokes((5, 6, 10, 12)), strokes((30, 20, 33, 31))]
    mask = mark_reference(image, layers, MASK).mask
    assert mask.sum() == 5 * 6 + 3 * 11 and mask[7, 6] and not mask[0, 0]
    assert mark_reference(image, layers, BOX).box == (5, 6, 33, 31)
    assert mark_reference(image, layers, MASK, "1, 2, 3.5, 4").box == (1, 2, 3.5, 4)
    assert not mark_reference(image, [strokes()]).is_marked
    scaled = mark_reference(image, [strokes((10, 10, 20, 20), size=(120, 80))], BOX)
    assert scaled.box == (5, 5, 10, 10)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("1,2,3", "not four numbers"),
        ("a,b,c,d", "not four numbers"),
        ("nan,0,9,inf", "not four numbers"),
        ("9,9,3,12", "empty or outside"),
        ("70,0,90,30", "empty or outside"),
    ],
)
def test_bad_boxes(text, fault):
    with pytest.raises(ValueError, match=fault):
        parse_box(text, (60, 40))


def test_boxes_are_clipped():
    assert parse_box("-5, 3, 99, 1e9", (60, 40)) == (0, 3, 60, 40)


def test_archives_contain_no_folders_of_the_uploads(tmp_path):
    mask = Image.new("L", (4, 4), 255)
    outcomes = [
        ImageOutcome("../../évil name.png", None, ConceptSegmentation(mask, "x", float("nan"))),
        ImageOutcome("a.png", None, ConceptSegmentation.failed("it is damaged.")),
    ]
    archive = zipfile.ZipFile(write_archive(tmp_path / "masks.zip", outcomes))
    assert archive.namelist() == ["0001_évil_name_mask.png", "results.json"]
    first, second = json.loads(archive.read("results.json"))
    assert first["mask"] == "0001_évil_name_mask.png" and first["score"] is None
    assert second["mask"] is None and second["error"] == "it is damaged."


def test_one_bad_file_does_not_end_a_batch(tmp_path):
    (tmp_path / "a.png").write_bytes(content_of(Image.new("RGB", (6, 5))))
    (tmp_path / "b.png").write_bytes(b"")
    outcomes = list(
        segment_images(
            [str(tmp_path / "b.png"), str(tmp_path / "a.png")],
            lambda image: ConceptSegmentation(Image.new("L", image.size), "x", 1.0),
        )
    )
    assert [outcome.result.error is None for outcome in outcomes] == [False, True]
    assert "is empty" in outcomes[0].result.error


def test_layers():
    image, mask = Image.new("RGB", (600, 500), (90, 90, 90)), Image.new("L", (600, 500))
    mask.paste(255, (100, 100, 200, 200))
    heatmap = np.zeros((500, 600), dtype=np.float32)
    result = ConceptSegmentation(mask, "x", 1.0, box=(100, 100, 200, 200), heatmap=heatmap)
    plain = draw_layers(image, result, ())
    assert plain.getpixel((150, 150)) == (90, 90, 90)
    assert draw_layers(image, result, ("mask",)).getpixel((150, 150))[2] > 120
    assert draw_layers(image, result, ("box",)).getpixel((100, 150)) == (255, 191, 0)
    assert draw_layers(image, result, ("heatmap",)).getpixel((5, 5)) != (90, 90, 90)
    assert draw_layers(Image.new("RGB", (64, 32)), ConceptSegmentation(None, "x", 0.0), ("mask",)).size == (
        512,
        256,
    )


def test_the_status_escapes_text_of_the_model():
    text = describe_route(
        ConceptSegmentation(None, "<img src=x>", 0.5, route="reasoning", presence=0.1, threshold=0.4)
    )
    assert "<img" not in text and "presence 0.10, threshold 0.40" in text


@pytest.fixture()
def demo(model, processor):
    return Demo(model, processor)


def test_a_canceled_run_ends_with_the_current_token(demo, picture):
    session, steps = Session(), []
    handle = demo.model.vlm.lm_head.register_forward_hook(lambda *_: steps.append(1))
    try:
        items = demo.stream(session, picture(0), "the odd one out", "full_reasoning")
        next(items)
        session.canceled = True
        with pytest.raises(Canceled):
            list(items)
        assert len(steps) < 700 and session.result is None
    finally:
        handle.remove()
    with pytest.raises(Canceled):  # also before it starts
        demo.segment(session, picture(0), "red circle", router="sam_only")
    session.canceled = False
    assert demo.segment(session, picture(0), "red circle", router="sam_only").route == "shortcut"


def test_the_status_names_words_that_the_model_does_not_know(picture):
    processor = ConceptSegProcessor.from_pretrained(nano_checkpoint())
    model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    handlers = Handlers(Demo(model, processor))

    def status(prompt):
        return list(handlers.run(picture(0), prompt, "sam_only", (), Session()))[-1]["status"]

    assert status("striped <quokka>").endswith("<br>not in the model's vocabulary: quokka")
    assert "vocabulary" not in status("striped cross")


def test_handlers_report_bad_inputs(demo, picture):
    handlers, session = Handlers(demo), Session()
    for call, fault in (
        (lambda: list(handlers.run(None, "x", "adaptive", (), session)), "there is no image"),
        (lambda: list(handlers.run(picture(0), " ", "adaptive", (), session)), "the concept is empty"),
        (lambda: list(handlers.run_with_rule(picture(0), "x", (), "", session)), "the rule is empty"),
        (lambda: list(handlers.induce("x", session)), "there is no marked reference"),
        (lambda: list(handlers.apply(["a"], (), session)), "there is no concept"),
        (lambda: handlers.add_reference(None, MASK, "", session), "there is no reference image"),
    ):
        with pytest.raises(ValueError, match=fault):
            call()
    session.references = [Reference(picture(0))] * 9
    with pytest.raises(ValueError, match="9 references already"):
        handlers.add_reference({"background": picture(0), "layers": []}, MASK, "", session)


def test_ports():
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is in use; give another one with --port"):
            find_port(port)
    assert find_port(port) == port


def test_components_check_uploads_before_gradio_reads_them(tmp_path):
    gr = pytest.importorskip("gradio")
    from gradio.components.image_editor import EditorData
    from gradio.data_classes import FileData, ImageData

    from conceptseg_hf.integrations.app.components import CheckedEditor, CheckedImage

    path = tmp_path / "a.png"
    path.write_bytes(content_of(Image.new("RGB", (6, 5), "red")))
    text = tmp_path / "text.png"
    text.write_text("text")
    image, editor = CheckedImage(), CheckedEditor()
    assert image.preprocess(ImageData(path=str(path), orig_name="a.png")).getpixel((0, 0)) == (255, 0, 0)
    marked = editor.preprocess(
        EditorData(background=FileData(path=str(path)), layers=[FileData(path=str(path))])
    )
    assert marked["background"].size == marked["layers"][0].size == (6, 5)
    assert editor.preprocess(EditorData()) is None and image.preprocess(None) is None
    for call in (
        lambda: image.preprocess(ImageData(path=str(text), orig_name="photo.png")),
        lambda: image.preprocess(ImageData(url="data:image/png;base64,AAAA")),
        lambda: editor.preprocess(EditorData(background=FileData(path=str(text)))),
    ):
        with pytest.raises(gr.Error):
            call()
