"""Where the files of a repository of the hub go: its own cache, which other programs share, so that
there is no second copy; or a directory of the user's, where they move to their names at the end."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import DownloadError
from ..user_dirs import hub_cache
from .api import HubFile, Listing


@dataclass(frozen=True)
class Place:
    """Where a repository's files go. directory: what is registered; own: the user chose it."""

    blobs: Path
    directory: Path
    own: bool

    @classmethod
    def of(cls, listing: Listing, to: Path | None) -> Place:
        if to is not None:
            to = to.expanduser().absolute()
            return cls(to / ".flashmoe-download", to, True)
        repo = hub_cache() / f"models--{listing.repo.replace('/', '--')}"
        return cls(repo / "blobs", repo / "snapshots" / listing.commit, False)

    def blob(self, file: HubFile) -> Path:
        """Where it is whole. In the user's directory also one that is there by its name."""
        named, blob = self.directory / file.name, self.blobs / self.key(file)
        there = self.own and not blob.exists() and named.is_file()
        return named if there and named.stat().st_size == file.nbytes else blob

    def part(self, file: HubFile) -> Path:
        return self.blobs / f"{self.key(file)}.flashmoe.incomplete"

    def key(self, file: HubFile) -> str:
        """What it is called before it has its name. In the cache files of one content are one."""
        return file.name if self.own else file.etag

    def here(self, file: HubFile) -> int:
        """Bytes of it that need not be fetched, as far as sizes tell."""
        for path in (self.blob(file), self.part(file)):
            with suppress(OSError):
                return min(path.stat().st_size, file.nbytes)
        return 0

    def check(self, listing: Listing) -> None:
        """
        Raises:
            DownloadError: the user's directory holds another checkpoint, which would be mixed in.
        """
        names = {file.name for file in listing.files}
        for path in sorted(self.directory.glob("model*.safetensors")) if self.own else ():
            if path.name not in names:
                raise DownloadError(
                    f"{path} is not of {listing.repo} at {listing.commit[:12]}: give an empty "
                    "directory, or remove it"
                )

    def finish(self, listing: Listing) -> None:
        """Give all files their names, config.json last: a model is there when that is."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for file in sorted(listing.files, key=lambda file: file.name == "config.json"):
            named, blob = self.directory / file.name, self.blob(file)
            if named == blob:
                continue
            if self.own:
                os.replace(blob, named)
            elif not (named.is_symlink() and named.resolve() == blob.resolve()):
                named.unlink(missing_ok=True)
                named.symlink_to(os.path.relpath(blob, named.parent))
        if self.own:
            shutil.rmtree(self.blobs)
        elif listing.revision != listing.commit and ".." not in listing.revision:
            ref = self.blobs.parent / "refs" / listing.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(listing.commit)
