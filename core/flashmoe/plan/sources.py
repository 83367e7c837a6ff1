"""Find what a plan needs of a model: its files, the headers on the hub, or its computed layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .. import catalog
from ..checkpoint.checkpoint import Checkpoint
from ..errors import DownloadError
from ..files import free_nbytes, nearest_existing_parent
from ..hub.known_models import Published
from ..user_dirs import hub_cache


@dataclass(frozen=True)
class Source:
    """Where the headers of a checkpoint are from.

    Attributes:
        directory: where the weights are, or where they would be downloaded to.
        repo, commit: repository of the hub; None if the weights are on this machine, and no commit
            if the hub could not be asked.
        to_fetch: bytes that would be downloaded.
        free: free bytes on the disk that they would be downloaded to.
        unreachable: why the headers are those of the layout that flashmoe computes for this name,
            and not the hub's.
        layout: how the hub's headers compare with the computed layout, for people; None where none
            is known.
    """

    directory: Path
    repo: str | None = None
    commit: str | None = None
    to_fetch: int = 0
    free: int = 0
    unreachable: str | None = None
    layout: str | None = None

    @property
    def here(self) -> bool:
        """Whether the weights are on this machine."""
        return self.repo is None

    @property
    def fits(self) -> bool:
        """Whether the disk has enough space for the weights."""
        return self.here or self.to_fetch < self.free


@contextmanager
def open_model(name: str) -> Iterator[tuple[Checkpoint, Source]]:
    """Yield the checkpoint of a name, without its weights if it is not on this disk.

    Then its headers are fetched from the hub, or, where the hub cannot be reached, computed.

    Raises:
        CheckpointError: it cannot be used.
        DownloadError: its headers can neither be fetched nor computed.
    """
    model = catalog.model(name)
    if model.path is not None:
        path = catalog.find(name)
        yield Checkpoint.open(path), Source(path)
        return
    published = model.published
    assert published is not None  # or the name would stand for nothing
    from ..hub.layouts import compare, compute_layout, open_computed_checkpoint

    layout = compute_layout(published)
    with ExitStack() as stack:
        try:
            checkpoint, source = _ask_hub(stack, published, patient=layout is None)
        except DownloadError as e:
            if layout is None:
                raise DownloadError(
                    f"{name} is not on this disk ({published.size}), and its headers could not be "
                    f"fetched: {e}"
                ) from e
            checkpoint = stack.enter_context(open_computed_checkpoint(layout))
            directory = nearest_existing_parent(hub_cache())
            free = free_nbytes(directory)
            source = Source(directory, published.repo, None, checkpoint.nbytes, free, str(e))
        else:
            if layout is not None:
                source = replace(source, layout=compare(layout, checkpoint))
        yield checkpoint, source


def _ask_hub(stack: ExitStack, published: Published, *, patient: bool) -> tuple[Checkpoint, Source]:
    """Return the checkpoint that the hub's headers describe, until `stack` is closed."""
    from ..hub import api as hub  # late: huggingface_hub
    from ..hub.download import Download
    from ..hub.headers import open_remote_checkpoint

    listing = hub.fetch_listing(published.repo, published.revision, patient=patient)
    planned = Download(listing)
    directory = nearest_existing_parent(planned.paths.blobs)
    missing, free = planned.missing_nbytes, planned.free_nbytes
    checkpoint = stack.enter_context(open_remote_checkpoint(listing))
    return checkpoint, Source(directory, listing.repo, listing.commit, missing, free)
