"""Tests that files are replaced completely or not at all, and what is said of a full disk."""

import json
import os
import stat

import pytest

from flashmoe import files


def test_content_is_replaced_and_no_partial_file_is_left(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    for concurrent in (False, True):
        files.write_json(file, {"ü": [1]}, concurrent=concurrent)
        assert json.loads(file.read_text()) == {"ü": [1]}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("concurrent", [False, True])
def test_error_while_writing_keeps_the_old_file(tmp_path, concurrent):
    file = tmp_path / "a.json"
    file.write_text("old")

    def interrupted():
        with files.replacing(file, concurrent=concurrent) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_partial_file_of_a_killed_process_is_overwritten(tmp_path):
    (tmp_path / f"a{files.PARTIAL}").write_text("left by a killed process")
    files.write_bytes(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]


def test_concurrent_writers_have_files_of_their_own_for_the_user_alone(tmp_path):
    file = tmp_path / "a.json"
    with files.replacing(file, concurrent=True) as one:
        with files.replacing(file, concurrent=True) as two:
            assert one != two
            two.write_text("two")
        one.write_text("one")
    assert file.read_text() == "one"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("durable", [True, False])
def test_bytes_and_name_are_synced_around_the_rename(tmp_path, monkeypatch, durable):
    calls = []

    def synced(fd):
        calls.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")

    def renamed(old, new, replace=os.replace):
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with files.replacing(tmp_path / "a", durable=durable) as partial:
        partial.write_text("x")
    assert calls == (["file", "rename", "directory"] if durable else ["rename"])


def test_file_system_that_cannot_sync_a_directory_is_accepted(tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(22, "Invalid argument")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_nearest_existing_parent_of_absent_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert files.nearest_existing_parent(tmp_path / "x" / "y") == tmp_path
    assert files.nearest_existing_parent(tmp_path / "file" / "y") == tmp_path / "file"
    assert str(files.nearest_existing_parent(type(tmp_path)("x/y"))) == os.getcwd()
    assert files.free_nbytes(tmp_path / "x" / "y") > 0


def test_full_disk_is_told_with_sizes_and_the_way_out(tmp_path):
    assert files.disk_too_full(tmp_path, 3 * 10**9, 10**9, "give another directory") == (
        f"3.0 GB are needed in {tmp_path}, and its disk has 1.0 GB free: free 2.0 GB, or give "
        "another directory"
    )
