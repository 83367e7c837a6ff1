"""Copy the files of a checkpoint that are not weights: tokenizer, chat template, licence.

A checkpoint may be from a stranger, and its copy may be published. So nothing is copied from
outside of the source: a link named chat_template.jinja could lead to a private file.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from ..checkpoint.safetensors_header import INDEX_NAME
from ..errors import CheckpointError

#: What `flashmoe quantize` notes about its work, beside the weights.
NOTE = "flashmoe_quantize.json"

_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
_WRITTEN_ANEW = ("config.json", INDEX_NAME, NOTE)


def extra_files(source: Path) -> dict[str, Path]:
    """Return the files to copy by name, with links resolved.

    A link may lead to another file of the source. In the hub's cache, where all files of a snapshot
    are links, it may lead to the blobs of the same repository.

    Raises:
        CheckpointError: one is a link to elsewhere, or is not a regular file.
    """
    source = source.resolve()
    allowed = [source]
    if source.parent.name == "snapshots" and source.parent.parent.name.startswith("models--"):
        allowed.append(source.parent.parent / "blobs")
    files = {}
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _COPIED or file.name.startswith("LICENSE")
        if file.name in _WRITTEN_ANEW or not wanted or file.is_dir():
            continue
        target = Path(os.path.realpath(file))
        if not any(target.is_relative_to(directory) for directory in allowed):
            raise CheckpointError(
                f"{file} is a link to {target}, outside of the checkpoint, and would be copied: "
                "remove it, or put the file itself there"
            )
        if not target.is_file():
            raise CheckpointError(f"{file} is not a regular file: remove it")
        files[file.name] = target
    return files


def copy_file(source: Path, copy: Path) -> None:
    """Copy a regular file; who may not read the source may not read the copy.

    Raises:
        CheckpointError: the source is a link or not a regular file any more.
        OSError: it cannot be copied.
    """
    # Not blocking: a pipe would wait for a writer.
    fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as f:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{source} is not a regular file any more: remove it")
        copy.unlink(missing_ok=True)
        made = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, (mode & 0o666) | 0o600)
        with open(made, "wb") as out:
            shutil.copyfileobj(f, out)
