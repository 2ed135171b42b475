"""Files are written atomically, failures raise one-sentence errors, and JSON is always valid."""

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
    open_new,
    write_error,
    write_file,
    write_files,
    write_json,
)


def test_full_disk_changes_nothing_and_names_the_file(limited_files, tmp_path):
    folder = tmp_path / "out"
    write_files({folder / "small": b"old", folder / "slow": "old"})
    with limited_files(1000):
        with pytest.raises(WriteError) as first:
            write_files({folder / "small": b"new", folder / "large": b"x" * 2000})
        with pytest.raises(WriteError) as second, open_new(folder / "slow") as file:
            for _ in range(2000):
                file.write("x")
    message = "{!r} cannot be written: File too large; free some disk space, or give another folder."
    assert str(first.value) == message.format(str(folder / "large"))
    assert str(second.value) == message.format(str(folder / "slow"))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"small": "old", "slow": "old"}


def test_write_files_is_all_or_nothing(tmp_path):
    (tmp_path / "in the way").mkdir()
    (tmp_path / "in the way" / "file").touch()
    with pytest.raises(WriteError, match=r"in the way' cannot be written: .*; give another folder\.$"):
        write_files({tmp_path / "first" / "deep": "text", tmp_path / "in the way": "text"})
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name.startswith(".")]
    assert left == []


def test_symbolic_links_and_default_permissions_are_kept(tmp_path):
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


def test_file_with_the_longest_name_can_be_written(tmp_path):
    write_file(tmp_path / ("é" * 127), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["é" * 127]


def test_interrupted_open_new_keeps_the_old_file(tmp_path):
    write_file(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), open_new(tmp_path / "a") as file:
        file.write("new")
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_nonfinite_numbers_are_null_in_json(value, tmp_path):
    content = {"a": value, "b": [1.5, (value, {"c": value})], "d": "NaN", "e": None, "f": True}
    write_json(tmp_path / "x.json", content)

    def refuse(name):
        raise AssertionError(f"{name} is not valid JSON")

    loaded = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert loaded == {"a": None, "b": [1.5, [None, {"c": None}]], "d": "NaN", "e": None, "f": True}
    assert json_text([1.25, 2]) == "[1.25, 2]"


def test_surrogates_are_written(tmp_path):
    assert encode_text("ü") == b"\xc3\xbc"
    assert encode_text("\udcc3\udcbc") == b"\xc3\xbc", "ü as decoded in an ASCII locale"
    assert encode_text("\udcff") == b"\\udcff" and encode_text("\ud800") == b"\\ud800"
    write_file(tmp_path / "a", "\udcff ü")
    assert (tmp_path / "a").read_bytes() == "\\udcff ü".encode()


@pytest.mark.parametrize(
    ("error", "reason", "full"),
    [
        (OSError(errno.ENOSPC, "whatever"), "No space left on device; free some disk space, or", True),
        (OSError(errno.EROFS, "whatever"), "Read-only file system; give another folder", False),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "No space left on device; free some disk space",
            True,
        ),
        (RuntimeError("unexpected pos 576\n vs 534."), "unexpected pos 576 vs 534; give", False),
    ],
)
def test_not_written_explains_errors_of_all_libraries(error, reason, full):
    message = str(write_error("a/b", error))
    assert message.startswith(f"'a/b' cannot be written: {reason}") and message.endswith("another folder.")
    assert is_full(error) is full
    assert write_error("c", write_error("a/b", error)).args == (message,)


def test_image_bytes_round_trip(tmp_path, picture):
    write_file(tmp_path / "a.png", image_bytes(picture(0)))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(picture(0)))
