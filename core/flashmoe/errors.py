"""The errors that flashmoe raises on purpose.

Each text is written for the user: it holds the values that are wrong and the way out. Front ends
show the text alone; a traceback is left for real bugs.
"""


class FlashMoEError(Exception):
    """Base of all errors that a user can mend."""


class CheckpointError(FlashMoEError):
    """A checkpoint directory that cannot be used: missing, corrupt, or of an unsupported kind."""


class QuantizeError(FlashMoEError):
    """A checkpoint that cannot be written: no room, something in the way, a faulty disk."""


class SweepError(FlashMoEError):
    """A comparison of versions of a model that cannot go on: no room, a faulty disk."""


class RegistryError(FlashMoEError):
    """The list of the user's models cannot be read or changed, or a name in it is taken."""


class DownloadError(FlashMoEError):
    """A checkpoint that could not be fetched whole and unchanged from the hub. Says what to do."""


class ReadError(FlashMoEError):
    """Expert bytes that could not be read while in use. Names file, layer, expert and range."""


class DeviceError(FlashMoEError):
    """The GPU's driver did not do what expert bytes need. Has CUDA's name of the error."""


class BudgetError(FlashMoEError):
    """A memory budget or a number of slots that is too small. Says how much is needed."""


class SettingError(FlashMoEError, ValueError):
    """An option outside its range, such as K above the trained one."""


class ContextError(SettingError):
    """A prompt that is longer than the model's context."""


class TimedOut(FlashMoEError, TimeoutError):
    """An answer that was not whole in the time it had."""


class OutputError(FlashMoEError):
    """An answer that is not what was asked for: JSON cut short, or against its schema.

    end: the `flashmoe.events.End` that the answer has instead, with its figures.
    """

    end = None


class ClusterError(FlashMoEError):
    """A host of a cluster that is gone, or does not fit the others. Says which, and why."""


class Cancelled(Exception):
    """Leaves a request that nobody waits for any more. No error: it does not reach a user."""
