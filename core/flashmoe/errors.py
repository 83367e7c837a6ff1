"""Define the errors that flashmoe raises on purpose.

The text of each error is written for the user: it has the wrong values and says what to do. Front
ends show only the text; a traceback means a bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .events import End


class FlashMoEError(Exception):
    """Base class of all errors that a user can fix."""


class CheckpointError(FlashMoEError):
    """Raised when a checkpoint cannot be used: it is missing, corrupt or unsupported."""


class QuantizeError(FlashMoEError):
    """Raised when a checkpoint cannot be written: the disk fails or is full, or files exist."""


class SweepError(FlashMoEError):
    """Raised when a comparison of model versions cannot go on: the disk is full or fails."""


class RegistryError(FlashMoEError):
    """Raised when the list of registered models cannot be read or changed, or a name is taken."""


class DownloadError(FlashMoEError):
    """Raised when a checkpoint cannot be downloaded completely and unchanged; says why."""


class ReadError(FlashMoEError):
    """Raised when expert bytes cannot be read; names the file, layer, expert and byte range."""


class DeviceError(FlashMoEError):
    """Raised when a call of the GPU's driver fails; gives CUDA's name of the error."""


class BudgetError(FlashMoEError):
    """Raised when a memory budget or number of slots is too small; says how much is needed."""


class SettingError(FlashMoEError, ValueError):
    """Raised when an option is out of range, such as K above the trained K."""


class ContextError(SettingError):
    """Raised when a prompt is longer than the model's context."""


class TimedOut(FlashMoEError, TimeoutError):
    """Raised when an answer is not complete within its timeout."""


class OutputError(FlashMoEError):
    """Raised when an answer does not have the requested format: it is cut short, or does not fit.

    Attributes:
        end: the last event of the answer, which is not emitted; None before the engine sets it.
    """

    end: End | None = None


class LimitError(FlashMoEError):
    """Raised when work on a request or a checkpoint takes more time or memory than it may."""


class HelperError(FlashMoEError):
    """Raised when a helper process, in which requests are checked, cannot run; says why."""


class ClusterError(FlashMoEError):
    """Raised when a worker of a cluster is gone or does not fit the others; says which, and why."""


class Cancelled(Exception):
    """Raised to abandon a request that nobody waits for any more; it does not reach a user."""
