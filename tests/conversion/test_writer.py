from __future__ import annotations

import errno

import pytest

from conceptseg_hf.conversion import ConversionError
from conceptseg_hf.conversion.writer import new_folder


def test_new_folder_is_renamed_when_complete(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists() and folder.parent == out.parent
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "file").read_text() == "x"
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, ConversionError])
def test_new_folder_is_removed_on_errors(tmp_path, interruption):
    (tmp_path / "a").mkdir()
    with pytest.raises(interruption), new_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "file").write_text("x")
        raise interruption
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_insufficient_disk_space_is_detected_before_writing(tmp_path):
    with (
        pytest.raises(ConversionError, match=r"needs 1000000000\.0 GB"),
        new_folder(tmp_path / "a" / "out", 10**18),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_sentence(tmp_path):
    message = r"^'.*out' cannot be written: No space left on device; .* give another folder\.$"
    with pytest.raises(ConversionError, match=message), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "whatever", str(folder / "half"))
    with pytest.raises(FileNotFoundError, match="source"), new_folder(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "whatever", "source")  # not a write error
    assert list(tmp_path.iterdir()) == []


def test_output_path_that_is_a_file_is_rejected(tmp_path):
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(ConversionError, match="is a file, not a folder; remove it or"),
        new_folder(tmp_path / "out"),
    ):
        pass
    with pytest.raises(ConversionError, match="cannot be created"), new_folder(tmp_path / "out" / "inner"):
        pass
    assert (tmp_path / "out").read_text() == "mine"
