"""A "device" whose memory is the host's."""

import ctypes

import mlx.core as mx
import numpy as np

from flashmoe.streaming.device_copy import DeviceMemory, Mailbox


class HostMemory(DeviceMemory):
    """Where bytes are copied to is memory of the host."""

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
    """With mailboxes, as a GPU with memory of its own has them."""

    def mailbox(self, words: int) -> Mailbox:
        # Nobody may look at more than was posted.
        made = np.full(words, 2**32 - 1, np.uint32)
        return Mailbox(made, mx.array([made.ctypes.data], mx.uint64))


def post(mailbox: mx.array, words: np.ndarray) -> None:
    """What a kernel does that has a mailbox's address; (1,) uint64, 0: there is none."""
    if address := mailbox.item():
        words = np.ascontiguousarray(words, np.uint32)
        ctypes.memmove(address, words.ctypes.data, words.nbytes)
