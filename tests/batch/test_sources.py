"""Images of a batch job: folders, globs, lists, tables and datasets on the Hub."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from conceptseg_hf.batch import open_images

from .conftest import draw


def names(source) -> list[str]:
    return [item.name for item in source.read(0, len(source))]


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    draw(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path: Path, rows: int, group: int = 2, column: str = "image", start: int = 0) -> Path:
    """Write a table with the image feature of `datasets`."""
    values = [{"bytes": encoded(start + i), "path": f"{start + i}.png"} for i in range(rows)]
    pq.write_table(pa.table({"label": [0] * rows, column: values}), path, row_group_size=group)
    return path


@pytest.fixture()
def tree(tmp_path, monkeypatch) -> Path:
    """A folder with two images, one of them in a subfolder, and files that are no images."""
    monkeypatch.chdir(tmp_path)
    for name in ("tree/b.png", "tree/a/c.JPG", "tree/.hidden/d.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        draw(0).save(name, "PNG")
    Path("tree/notes.txt").write_text(
        "b.png\n\n  a/c.JPG \nhttps://example.org/e.png\nnone.png\n", "utf-8-sig"
    )
    Path("tree/._b.png").write_bytes(b"\0\5\x16\7")
    return tmp_path / "tree"


def test_folder(tree):
    source = open_images(tree)
    assert names(source) == ["a/c.JPG", "b.png"]
    assert [item.index for item in source.read(1, 2)] == [1]
    assert Path(source.read(0, 1)[0].image) == tree / "a/c.JPG"


def test_paths_hold_in_another_working_directory(tree, tmp_path, monkeypatch):
    sources = [open_images("tree"), open_images("tree/*.png"), open_images("tree/notes.txt")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for source in sources:
        first = source.read(0, 1)[0]
        assert first.name in ("a/c.JPG", "tree/b.png", "b.png") and Image.open(first.image).size == (48, 40)


def test_glob(tree):
    assert names(open_images("tree/**/*")) == ["tree/a/c.JPG", "tree/b.png"]
    assert names(open_images(str(tree / "*.png"))) == [str(tree / "b.png")]
    assert names(open_images("tree/b.png")) == ["b.png"]


def test_list_is_relative_to_its_folder_and_keeps_missing_files_and_urls(tree):
    source = open_images("tree/notes.txt")
    assert names(source) == ["b.png", "a/c.JPG", "https://example.org/e.png", "none.png"]
    images = [item.image for item in source.read(0, 4)]
    assert images[2] == "https://example.org/e.png" and Path(images[1]) == tree / "a/c.JPG"
    assert names(open_images(["x.png", "y.png"])) == ["x.png", "y.png"]


def test_identity_depends_on_names_and_order():
    first = open_images(["a.png", "b.png"]).identity()
    assert open_images(["a.png", "b.png"]).identity() == first
    for other in (["b.png", "a.png"], ["a.png"], ["a.pngb.png"]):
        assert open_images(other).identity() != first


def test_table_of_encoded_images(tmp_path):
    source = open_images(write_table(tmp_path / "t.parquet", 5))
    assert len(source) == 5 and names(source) == [f"{i}.png" for i in range(5)]
    for item in [*source.read(1, 4), *pickle.loads(pickle.dumps(source)).read(4, 9)]:
        assert Image.open(io.BytesIO(item.image)).tobytes() == draw(item.index).tobytes()


def test_table_of_bytes_and_of_paths(tmp_path):
    pq.write_table(pa.table({"id": [7, 8], "bytes": [encoded(0), None]}), tmp_path / "bytes.parquet")
    first, second = open_images(tmp_path / "bytes.parquet").read(0, 2)
    assert (first.name, first.image) == ("bytes.parquet#0", encoded(0))
    assert second.image is None
    assert second.error == (
        f"row 1 of {str(tmp_path / 'bytes.parquet')!r} has no value in column 'bytes'; add an image."
    )
    pq.write_table(pa.table({"path": ["s/x.png", "http://h/y.png", ""]}), tmp_path / "paths.parquet")
    items = open_images(tmp_path / "paths.parquet").read(0, 3)
    assert [item.image for item in items] == [str(tmp_path / "s/x.png"), "http://h/y.png", None]
    pq.write_table(pa.table({"photo": ["x.png"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"no column with a usual name; name one of .*: photo"):
        open_images(tmp_path / "other.parquet")
    assert names(open_images(tmp_path / "other.parquet", "photo")) == ["x.png"]
    with pytest.raises(ValueError, match="no column 'none' of paths or bytes"):
        open_images(tmp_path / "other.parquet", "none")


def test_folder_of_tables_reads_each_row_group_once(tmp_path, monkeypatch):
    write_table(tmp_path / "b.parquet", 3, start=4)
    write_table(tmp_path / "a.parquet", 4, group=4)
    source = open_images(tmp_path)
    groups = []
    read = type(source)._read_group
    monkeypatch.setattr(
        type(source), "_read_group", lambda self, *where: groups.append(where) or read(self, *where)
    )
    found = [item for start in range(0, 7, 2) for item in source.read(start, start + 2)]
    assert [item.name for item in found] == [f"{i}.png" for i in range(7)]
    assert groups == [(0, 0), (1, 0), (1, 1)]


def test_damaged_row_group_gives_an_error_for_its_rows_only(tmp_path):
    path = write_table(tmp_path / "t.parquet", 4)
    start = pq.read_metadata(path).row_group(1).column(1).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 12] = bytes(12)
    path.write_bytes(damaged)
    items = open_images(path).read(0, 4)
    assert [item.error is None for item in items] == [True, True, False, False]
    assert "row group 1 of" in items[2].error and items[2].error.endswith("; write the table again.")


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    """A dataset in the cache of the Hub, which is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "datasets--owner--shapes"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    folder = root / "snapshots" / commit
    for name in ("data", "images/test"):
        (folder / name).mkdir(parents=True)
    write_table(folder / "data" / "test-00000.parquet", 2)
    write_table(folder / "data" / "train-00000.parquet", 3)
    for number in range(2):
        draw(number).save(folder / "images" / "test" / f"{number}.png")
    return folder


def test_dataset_on_the_hub(hub):
    assert len(open_images("hf://datasets/owner/shapes")) == 5  # tables come before images
    assert len(open_images("hf://datasets/owner/shapes/data/test-*.parquet")) == 2
    source = open_images("hf://datasets/owner/shapes@main/images")
    assert names(source) == ["images/test/0.png", "images/test/1.png"]
    assert Path(source.read(0, 1)[0].image).samefile(hub / "images/test/0.png")


def test_another_commit_of_a_dataset_is_another_source(hub):
    before = open_images("hf://datasets/owner/shapes/images").identity()
    commit = "f" * 40
    hub.rename(hub.with_name(commit))
    (hub.parents[1] / "refs" / "main").write_text(commit)
    assert open_images("hf://datasets/owner/shapes/images").identity() != before


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("none", "'none' is neither a folder nor a file"),
        ("tree/*.gif", "contains no image"),
        ("tree/.hidden/..", None),
        ("empty", "contains no image"),
        ("x\0y", "neither a folder"),
        ("x" * 5000, "neither a folder"),
        ("broken.parquet", "is not a Parquet table or is damaged"),
        ("code.py", "is neither an image nor a list"),
        ("hf://owner/name", "is not a dataset"),
        ("hf://datasets/owner/none", "cannot be downloaded"),
        ([], "contains no image"),
    ],
)
def test_bad_images_give_one_sentence(images, message, tree, hub):
    Path("empty").mkdir()
    Path("broken.parquet").write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    Path("code.py").write_text("pass")
    if message is None:
        assert len(open_images(images)) == 2
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_images(images)
    assert "\n" not in str(caught.value)


def test_column_needs_a_table(tree):
    with pytest.raises(ValueError, match=r"contains no \.parquet table; omit the column 'image'"):
        open_images("tree", "image")
