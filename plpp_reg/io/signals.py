"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is at work is closed in order, and one line says so."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

NAMES = ("SIGTERM", "SIGHUP")  # of which Windows has but the first


class Stopped(KeyboardInterrupt):
    """Raised where the program is when the signal comes."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def stopped_as_by_ctrl_c() -> Iterator[None]:
    """In it a signal raises :class:`Stopped`, unless somebody has set it to something else: ``nohup`` ignores SIGHUP.

    A second signal ends the process at once.
    """
    before, came = {}, []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        restore()
        raise Stopped(number)

    def restore() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():  # Python sets signals in no other
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as e:
        if came and not isinstance(e, Stopped):  # Ray, waiting in C++, makes a KeyboardInterrupt of whatever a signal raises
            raise Stopped(came[0]) from e
        raise
    finally:
        restore()


@contextlib.contextmanager
def kept(number: int) -> Iterator[None]:
    """What a signal does is afterwards what it was before, whatever is set inside."""
    before, main = signal.getsignal(number), threading.current_thread() is threading.main_thread()
    try:
        yield
    finally:
        if main and before is not None:
            signal.signal(number, before)
