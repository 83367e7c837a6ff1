"""End this process within seconds of a signal, whatever its threads are doing.

Python runs its signal handlers in the main thread, between two instructions. None runs while that
thread is inside C code (an import, a compiler, a kernel), or while another thread holds the
interpreter. So the last word belongs to the kernel, which needs neither: it is the default action
of a signal, or a timer.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

#: The exit status of a process that a signal ended, as shells report it.
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def end_on_signals() -> None:
    """Let SIGTERM and the second Ctrl-C end this process at once, with the statuses 143 and 130.

    The first Ctrl-C raises KeyboardInterrupt, as usual. A signal that this process was started to
    ignore (`nohup`, `&` in a script) stays ignored. Does nothing outside the main thread, where
    handlers cannot be set.
    """
    if not _in_main_thread():
        return
    if _is_default(signal.SIGTERM):
        end_at_next(signal.SIGTERM)
    if callable(signal.getsignal(signal.SIGINT)):
        _end_at_second(signal.SIGINT)


def end_at_next(number: signal.Signals) -> None:
    """Let the next signal of this number end the process at once. Needs the main thread."""
    # The kernel does not do the default action of a signal to the first process of a container.
    signal.signal(number, _exit_now if os.getpid() == 1 else signal.SIG_DFL)


def end_within(seconds: float, status: int) -> None:
    """End this process with a status after some seconds, if it is still alive. Needs the main
    thread.

    Args:
        seconds: time for an end of its own, which is cleaner.
        status: the exit status. If another thread holds the interpreter all the time, the kernel
            ends the process a little later, by SIGALRM (142).
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + 0.3)
    # Threads and exit functions may wait for ever for what is under way: os._exit asks none.
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()


def exit_at_once(status: int) -> NoReturn:
    """Run the exit functions, and end this process without freeing all that Python has loaded.

    That alone may take a second.
    """
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)


def close_at_exit(close: Callable[[], None]) -> None:
    """Call a function when the interpreter exits, in which Ctrl-C ends the process at once.

    A KeyboardInterrupt there would only be printed, and leave threads alive that abort the process
    (status 134). `atexit.unregister` undoes this.
    """
    atexit.register(close)
    # Functions run in reverse order: this one is to be the first.
    atexit.unregister(_interrupt_ends)
    atexit.register(_interrupt_ends)


def _interrupt_ends() -> None:
    if _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        end_at_next(signal.SIGINT)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_default(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_DFL


def _exit_now(number: int, frame: FrameType | None) -> None:
    os._exit(STATUS[signal.Signals(number)])


class _Linux(ctypes.Structure):
    """`struct sigaction` of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_uint),
        ("restorer", ctypes.c_void_p),
    )


class _MacOS(ctypes.Structure):
    """`struct sigaction` of macOS."""

    _fields_ = (("handler", ctypes.c_void_p), ("mask", ctypes.c_uint), ("flags", ctypes.c_uint))


#: The struct by platform, and its flag SA_RESETHAND.
_ACTIONS: dict[str, tuple[type[_Linux | _MacOS], int]] = {
    "linux": (_Linux, 0x80000000),
    "darwin": (_MacOS, 0x4),
}


def _end_at_second(number: signal.Signals) -> None:
    """Keep the handler for the next signal; the kernel takes the default action for later ones.

    A handler that resets itself in Python would need the interpreter to do so.
    """
    handler = signal.getsignal(number)
    if os.getpid() == 1 or sys.platform not in _ACTIONS:

        def first(number: int, frame: FrameType | None) -> None:
            end_at_next(signal.Signals(number))
            if callable(handler):
                handler(number, frame)

        signal.signal(number, first)
        return
    kind, reset_handler = _ACTIONS[sys.platform]
    sigaction = ctypes.CDLL(None).sigaction
    action = kind()
    if sigaction(int(number), None, ctypes.byref(action)) == 0:
        action.flags |= reset_handler
        sigaction(int(number), ctypes.byref(action), None)
