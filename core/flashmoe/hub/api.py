"""What the Hugging Face hub says of a repository: which files, how large, with which hashes. Its
errors, in the user's words. It imports huggingface_hub, so only a download imports it."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from ..errors import DownloadError

T = TypeVar("T")

#: Failures without a new byte before giving up, and the longest wait that a server may ask for.
TRIES, LONGEST_WAIT = 3, 300
# Weights, configuration, chat templates, tokenizers. No code, no pickles. mlx-lm reads no other
# weights, and nothing in folders.
_NEEDED = re.compile(r"model[\w.+-]*\.safetensors|[\w+-][\w.+-]*\.(json|jinja|txt|model|tiktoken)")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. etag: what the hub's cache calls it: the sha256 of a large file, the
    git hash of a small one."""

    name: str
    nbytes: int
    etag: str
    url: str

    @property
    def is_sha256(self) -> bool:
        return len(self.etag) == 64

    def hasher(self):
        """An empty hash; fed with the whole file it gives the etag."""
        if self.is_sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.nbytes, usedforsecurity=False)


@dataclass(frozen=True)
class Listing:
    """The files of a repository that a model needs, small ones first, at one commit."""

    repo: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


class Short(OSError):
    """A file that ended early, as if it were whole."""


def listing(repo: str, revision: str | None = None) -> Listing:
    """
    Raises:
        DownloadError: there is no such repository, it may not be read, or it holds no checkpoint.
    """
    revision = revision or constants.DEFAULT_REVISION
    with explained(repo, revision):
        info = patiently(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
    if not constants.REGEX_COMMIT_OID.fullmatch(info.sha or ""):  # it names a directory
        raise DownloadError(f"{_endpoint()} gives no commit of {repo}: check HF_ENDPOINT")
    files = []
    for sibling in info.siblings or ():
        if _NEEDED.fullmatch(sibling.rfilename):
            etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            nbytes = sibling.lfs.size if sibling.lfs else sibling.size
            if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag or "") or nbytes is None:
                raise DownloadError(
                    f"{_endpoint()} gives no hash or no size of {repo}/{sibling.rfilename}, so it "
                    "could not be verified: check HF_ENDPOINT"
                )
            url = hf_hub_url(repo, sibling.rfilename, revision=info.sha)
            files.append(HubFile(sibling.rfilename, nbytes, etag, url))
    names = {file.name for file in files}
    if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
        raise DownloadError(
            f"{repo} at {revision} holds no config.json with model*.safetensors: only checkpoints "
            "in MLX's format can be used, such as those of mlx-community"
        )
    return Listing(repo, revision, info.sha, tuple(sorted(files, key=lambda f: f.nbytes)))


def headers() -> dict[str, str]:
    """Of each request for a file, with the user's token. Compressed, it could not be resumed."""
    found = build_hf_headers(library_name="flashmoe", library_version=version("llm-flashmoe"))
    return found | {"Accept-Encoding": "identity"}


def patiently(call: Callable[[], T], progressed: Callable[[], bool] = lambda: False) -> T:
    """What a call returns; it is made again after errors that pass.

    Args:
        progressed: whether the call that has failed got any further; then it does not count.
    """
    failures = 0
    while True:
        try:
            return call()
        except (HTTPError, OSError) as e:
            failures = 1 if progressed() else failures + 1
            wait = _wait(e, failures)
            if wait is None or failures >= TRIES:
                raise
            time.sleep(wait)


def _wait(error: Exception, failures: int) -> float | None:
    """Seconds until it may be tried again; None when that would not help."""
    if isinstance(error, OfflineModeIsEnabled):
        return None
    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "")
        if error.response.status_code not in (408, 429, 500, 502, 503, 504):
            return None
        if asked.isdigit():
            return int(asked) if int(asked) <= LONGEST_WAIT else None
    elif not isinstance(error, HTTPError | Short):
        return None  # of the disk
    return 2.0 ** (failures - 1)


@contextmanager
def explained(repo: str, revision: str) -> Iterator[None]:
    """The errors of huggingface_hub as ours."""
    try:
        yield
    except OfflineModeIsEnabled as e:
        raise DownloadError(
            f"HF_HUB_OFFLINE is set, so {repo} is not fetched: unset it, or register a directory "
            "that is here: flashmoe register DIR"
        ) from e
    except GatedRepoError as e:
        raise DownloadError(
            f"{repo} is gated: ask for access at {_endpoint()}/{repo}, then log in with "
            "`hf auth login` or set HF_TOKEN, and run this again"
        ) from e
    except RepositoryNotFoundError as e:
        raise DownloadError(
            f"{_endpoint()} has no repository {repo} that you may read: check the name; if it is "
            "private, log in with `hf auth login` or set HF_TOKEN"
        ) from e
    except RevisionNotFoundError as e:
        raise DownloadError(
            f"{repo} has no revision {revision}: give a branch, a tag or a commit of it"
        ) from e
    except HFValidationError as e:
        raise DownloadError(f"{repo!r} is no name of a repository: {_first_line(e)}") from e
    except HfHubHTTPError as e:
        raise DownloadError(_of_status(repo, e.response)) from e
    except (HTTPError, Short) as e:
        raise DownloadError(
            f"{repo} could not be fetched from {_endpoint()} ({_first_line(e)}): check the network "
            "and run this again; it goes on where it stopped"
        ) from e


def _of_status(repo: str, response) -> str:
    status, asked = response.status_code, response.headers.get("Retry-After")
    if status in (401, 403):
        return (
            f"{_endpoint()} refuses {repo} ({status}): ask for access on its page, log in with "
            "`hf auth login` or set HF_TOKEN, and run this again"
        )
    if status == 429:
        wait = f"wait {asked} s" if asked else "wait some minutes"
        return f"{_endpoint()} refuses more requests for now (429): {wait}, and run this again"
    return (
        f"{_endpoint()} answers {status} for {repo}: run this again later; it goes on where it "
        "stopped"
    )


def _endpoint() -> str:
    return constants.ENDPOINT


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
