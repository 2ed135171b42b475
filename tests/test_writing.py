"""Files are complete or not there; what cannot be written is one sentence; JSON is always JSON."""

from __future__ import annotations

import errno
import json
import os
import stat

import numpy as np
import pytest
from PIL import Image

from conceptseg_hf.writing import (
    WriteError,
    encode_text,
    image_bytes,
    is_full,
    json_text,
    write_error,
    open_new,
    write_file,
    write_files,
    write_json,
)

# A file may not grow beyond a limit: what a full disk is to a single file, without a disk of one's own.
LIMITED = """
import resource, sys
from pathlib import Path
from conceptseg_hf.writing import WriteError, open_new, write_files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
try:
    write_files({folder / "small": b"new", folder / "large": b"x" * 2000})
except WriteError as error:
    print(error)
try:
    with open_new(folder / "slow") as file:
        for _ in range(2000):
            file.write("x")
except WriteError as error:
    print(error)
"""


def test_on_a_full_disk_nothing_changes_and_the_file_is_named(fresh_python, tmp_path):
    pytest.importorskip("resource")
    folder = tmp_path / "out"
    write_files({folder / "small": b"old", folder / "slow": "old"})
    first, second = fresh_python(LIMITED, str(folder)).splitlines()
    said = "{!r} cannot be written: File too large; make room, or give another folder."
    assert first == said.format(str(folder / "large")) and second == said.format(str(folder / "slow"))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"small": "old", "slow": "old"}


def test_files_that_belong_together_appear_together(tmp_path):
    (tmp_path / "in the way").mkdir()
    (tmp_path / "in the way" / "file").touch()
    with pytest.raises(WriteError, match=r"in the way' cannot be written: .*; give another folder\.$"):
        write_files({tmp_path / "first" / "deep": "text", tmp_path / "in the way": "text"})
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name.startswith(".")]
    assert left == []


def test_a_link_stays_and_permissions_are_the_users(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "x.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real" / "x.json").read_text()) == {"a": 1}
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_the_longest_name_has_room_for_the_temporary_one(tmp_path):
    write_file(tmp_path / ("é" * 127), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["é" * 127]


def test_an_interrupted_block_leaves_the_old_file(tmp_path):
    write_file(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), open_new(tmp_path / "a") as file:
        file.write("new")
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_json_has_no_numbers_that_are_not_finite(value, tmp_path):
    content = {"a": value, "b": [1.5, (value, {"c": value})], "d": "NaN", "e": None, "f": True}
    write_json(tmp_path / "x.json", content)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert found == {"a": None, "b": [1.5, [None, {"c": None}]], "d": "NaN", "e": None, "f": True}
    assert json_text([1.25, 2]) == "[1.25, 2]"


def test_text_that_no_encoding_has_is_written(tmp_path):
    assert encode_text("ü") == b"\xc3\xbc"
    assert encode_text("\udcc3\udcbc") == b"\xc3\xbc", "what an ASCII locale makes of ü"
    assert encode_text("\udcff") == b"\\udcff" and encode_text("\ud800") == b"\\ud800"
    write_file(tmp_path / "a", "\udcff ü")
    assert (tmp_path / "a").read_bytes() == "\\udcff ü".encode()


@pytest.mark.parametrize(
    ("error", "reason", "full"),
    [
        (OSError(errno.ENOSPC, "whatever"), "No space left on device; make room, or give", True),
        (OSError(errno.EROFS, "whatever"), "Read-only file system; give another folder", False),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "No space left on device; make",
            True,
        ),
        (RuntimeError("unexpected pos 576\n vs 534."), "unexpected pos 576 vs 534; give", False),
    ],
)
def test_the_reason_is_said_whatever_library_found_it(error, reason, full):
    said = str(write_error("a/b", error))
    assert said.startswith(f"'a/b' cannot be written: {reason}") and said.endswith("another folder.")
    assert is_full(error) is full
    assert write_error("c", write_error("a/b", error)).args == (said,)


def test_a_picture_is_what_pillow_would_write(tmp_path, picture):
    write_file(tmp_path / "a.png", image_bytes(picture(0)))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(picture(0)))
