from __future__ import annotations

import os
import threading

import pytest

from iared2.atomic import whole, write
from iared2.errors import InputError


def test_a_file_is_replaced_at_once_with_the_permissions_of_a_new_one(tmp_path):
    (tmp_path / "new").touch()
    write(tmp_path / "a", "é")
    write(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "new").stat().st_mode
    write(tmp_path / "b" / "c" / "d", "deep", parents=True)
    assert (tmp_path / "b" / "c" / "d").read_text() == "deep"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "new"]


def test_files_beside_it_come_with_it_or_not_at_all(tmp_path):
    with whole(tmp_path / "a") as file:
        file.write_text("a")
        file.with_name("z").write_text("z")
    assert sorted(os.listdir(tmp_path)) == ["a", "z"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write .*folder is a folder"), whole(tmp_path / "a") as file:
        file.write_text("new")
        file.with_name("b").write_text("b")
        file.with_name("folder").write_text("no")
    assert sorted(os.listdir(tmp_path)) == ["a", "folder", "z"]
    assert (tmp_path / "a").read_text() == "a"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no\nsuch"), KeyboardInterrupt()])
def test_what_was_there_stays_if_writing_fails(tmp_path, error):
    write(tmp_path / "a", "old")
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError
    with pytest.raises(kind) as caught, whole(tmp_path / "a", errors=ValueError) as file:
        file.write_text("half")
        raise error
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("path", ["no/such/folder/a", "file/a", "", "x" * 300])
def test_where_nothing_can_be_written(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write(path, "a")
    assert os.listdir(tmp_path) == ["file"]


def test_links_and_devices_stay(tmp_path):
    write(tmp_path / "a", "a")
    (tmp_path / "link").symlink_to("a")
    write(tmp_path / "link", "b")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_text() == "b"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write(tmp_path / "pipe", "through")
    reader.join()
    assert read == ["through"]
    assert (tmp_path / "pipe").is_fifo()
