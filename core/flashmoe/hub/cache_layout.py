"""Decide where the files of a repository of the hub go.

They go to the hub's own cache, which other programs share, so that there is no second copy; or to a
directory that the user chose, where they move to their names at the end.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import DownloadError
from ..files import write_bytes
from ..user_dirs import hub_cache
from .api import HubFile, Listing

# The suffix of files that are not complete.
_PARTIAL = ".flashmoe.incomplete"


@dataclass(frozen=True)
class DownloadPaths:
    """Where the files of one download are.

    Attributes:
        blobs: the directory of the files while they are downloaded; in the cache also afterwards.
        directory: the checkpoint directory, which is registered.
        chosen_by_user: `directory` is not in the hub's cache.
    """

    blobs: Path
    directory: Path
    chosen_by_user: bool

    @classmethod
    def for_listing(cls, listing: Listing, to: Path | None) -> DownloadPaths:
        """Return the paths for a repository.

        Args:
            to: the directory that the user chose. None: the hub's cache.
        """
        if to is not None:
            to = to.expanduser().absolute()
            return cls(to / ".flashmoe-download", to, True)
        repo = hub_cache() / f"models--{listing.repo.replace('/', '--')}"
        return cls(repo / "blobs", repo / "snapshots" / listing.commit, False)

    def complete(self, file: HubFile) -> Path:
        """Return the path of a file once it is complete.

        In the user's directory this may be its final name, when a file of the right size is there.
        """
        named, blob = self.directory / file.name, self.blobs / self.key(file)
        is_named = self.chosen_by_user and not blob.exists() and named.is_file()
        return named if is_named and named.stat().st_size == file.nbytes else blob

    def partial(self, file: HubFile) -> Path:
        """Return the path of a file while it is not complete."""
        return self.blobs / f"{self.key(file)}{_PARTIAL}"

    def key(self, file: HubFile) -> str:
        """Return the name of a file in `blobs`. In the cache, files of equal content share it."""
        return file.name if self.chosen_by_user else file.etag

    def present_nbytes(self, file: HubFile) -> int:
        """Return the bytes of a file that need not be fetched, judged by sizes alone."""
        for path in (self.complete(file), self.partial(file)):
            with suppress(OSError):
                return min(path.stat().st_size, file.nbytes)
        return 0

    def check_no_other_shards(self, listing: Listing) -> None:
        """Check that the user's directory holds no shards of another checkpoint.

        Raises:
            DownloadError: it does, and mlx-lm would load them together with those of the listing.
        """
        names = {file.name for file in listing.files}
        for path in (
            sorted(self.directory.glob("model*.safetensors")) if self.chosen_by_user else ()
        ):
            if path.name not in names:
                raise DownloadError(
                    f"{path} does not belong to {listing.repo} at {listing.commit[:12]}: give an "
                    "empty directory, or remove the file"
                )

    def remove_partials_of_other_files(self, listing: Listing) -> None:
        """Remove what killed downloads of other commits left; no other download may be running."""
        mine = {self.partial(file) for file in listing.files}
        for path in self.blobs.glob(f"*{_PARTIAL}"):
            if path not in mine:
                path.unlink()

    def move_into_place(self, listing: Listing) -> None:
        """Give all files their final names, config.json last: with it the checkpoint exists.

        Raises:
            OSError: a file cannot be renamed or linked.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for file in sorted(listing.files, key=lambda file: file.name == "config.json"):
            named, blob = self.directory / file.name, self.complete(file)
            if named == blob:
                continue
            if self.chosen_by_user:
                os.replace(blob, named)
            elif not (named.is_symlink() and named.resolve() == blob.resolve()):
                named.unlink(missing_ok=True)
                named.symlink_to(os.path.relpath(blob, named.parent))
        if self.chosen_by_user:
            shutil.rmtree(self.blobs)
        elif listing.revision != listing.commit and ".." not in listing.revision:
            ref = self.blobs.parent / "refs" / listing.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(ref, listing.commit.encode())
