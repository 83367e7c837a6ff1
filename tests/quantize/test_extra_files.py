"""Only files of the checkpoint itself are copied, and copies keep who may read them."""

import os
import re
import shutil
import socket

import pytest
from command_line import run

from flashmoe.errors import CheckpointError
from flashmoe.quantize.extra_files import copy_file, extra_files


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "secret"
    file.write_text("private")
    return file


def test_link_that_leaves_the_source_is_refused_before_anything_is_written(
    tmp_path, checkpoint_dir, secret
):
    (checkpoint_dir / "notes.txt").symlink_to(secret)
    said = run("quantize", checkpoint_dir, tmp_path / "out", "--bits", 3, code=1)
    assert f"is a link to {secret}, outside of the checkpoint" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "README.md", "chat_template.jinja"])
@pytest.mark.parametrize("target", ["../secret", "../one-more/x", "/etc/passwd", "sub/link"])
def test_links_to_elsewhere_are_refused(tmp_path, checkpoint_dir, secret, name, target):
    (tmp_path / "one-more").mkdir()  # its path begins like that of the source, "one"
    (tmp_path / "one-more" / "x").write_text("private")
    (checkpoint_dir / "sub").mkdir()
    (checkpoint_dir / "sub" / "link").symlink_to(secret)
    (checkpoint_dir / name).unlink(missing_ok=True)
    (checkpoint_dir / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=re.escape(str(checkpoint_dir / name))):
        extra_files(checkpoint_dir)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "broken link"])
def test_special_files_are_refused(checkpoint_dir, kind, monkeypatch):
    file = checkpoint_dir / "notes.txt"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "socket":
        monkeypatch.chdir(checkpoint_dir)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("notes.txt")
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.symlink_to("nothing")
    with pytest.raises(CheckpointError, match="not a regular file|outside of the checkpoint"):
        extra_files(checkpoint_dir)


def test_links_inside_the_source_are_followed(checkpoint_dir):
    (checkpoint_dir / "sub").mkdir()
    (checkpoint_dir / "sub" / "x").write_text("text")
    (checkpoint_dir / "notes.txt").symlink_to("sub/x")
    assert extra_files(checkpoint_dir)["notes.txt"] == (checkpoint_dir / "sub" / "x").resolve()


def test_snapshot_of_the_hubs_cache_is_copied(tmp_path, checkpoint_dir):
    repo = tmp_path / "hub" / "models--owner--toy"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (checkpoint_dir / "notes.txt").write_text("text")
    for i, file in enumerate(sorted(checkpoint_dir.iterdir())):
        shutil.move(file, blobs / f"{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    run("quantize", snapshot, tmp_path / "out", "--bits", 3)
    copy = tmp_path / "out" / "notes.txt"
    assert (copy.read_text(), copy.is_symlink()) == ("text", False)
    (snapshot / "more.txt").symlink_to("../../../models--owner--other/blobs/0")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        extra_files(snapshot)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o444, 0o4755, 0o777])
def test_copy_may_be_read_by_those_who_may_read_the_source(tmp_path, mode):
    source, copy = tmp_path / "a", tmp_path / "b"
    source.write_text("text")
    source.chmod(mode)
    before = os.umask(0o022)
    try:
        copy_file(source, copy)
    finally:
        os.umask(before)
    assert copy.read_text() == "text"
    assert copy.stat().st_mode & 0o7777 == (mode & 0o644) | 0o600


def test_link_that_appears_after_the_check_is_not_followed(tmp_path, secret):
    (tmp_path / "link").symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        copy_file(tmp_path / "link", tmp_path / "copy")
