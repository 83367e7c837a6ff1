"""A stand-in for a device with its own memory, which is host memory here."""

import ctypes

import mlx.core as mx
import numpy as np

from flashmoe.streaming.device_copy import DeviceMemory, Mailbox


class HostMemory(DeviceMemory):
    """Device memory that is host memory. locked: how many staging places were page-locked."""

    def __init__(self):
        super().__init__()
        self.locked = 0

    def address(self, array) -> int:
        view = np.array(array.view(mx.uint8), copy=False)
        return view.__array_interface__["data"][0]

    def write(self, address, source):
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def lock(self, place):
        self.locked += 1


class HostMailboxes(HostMemory):
    """The same with mailboxes, as a GPU with its own memory has them."""

    def mailbox(self, words: int) -> Mailbox:
        # Words that were not posted are no valid expert, so a test sees when somebody reads them.
        array = np.full(words, 2**32 - 1, np.uint32)
        return Mailbox(array, mx.array([array.ctypes.data], mx.uint64))


def post(mailbox: mx.array, words: np.ndarray) -> None:
    """Write words to a mailbox, as a kernel does that gets its address.

    mailbox: the address, of shape (1,) and dtype uint64; 0 where there is no mailbox.
    """
    if address := mailbox.item():
        words = np.ascontiguousarray(words, np.uint32)
        ctypes.memmove(address, words.ctypes.data, words.nbytes)
