"""Holding Ctrl-C back while a weight and what is known about it do not agree."""

# Not `signal`, whose wrappers look for enum members: 10 us a call, in every eval() and train().
import _signal  # type: ignore[import-not-found]
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[None]:
    """Deliver a SIGINT that comes during the body of a `with` statement after it.

    Python handles signals in the main thread only; in another thread there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _signal.getsignal(_signal.SIGINT)
    received: list[tuple[int, FrameType | None]] = []
    if not callable(handler):  # ignored, the system's own, or not Python's
        yield
        return
    _signal.signal(_signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        _signal.signal(_signal.SIGINT, handler)
    if received:
        handler(*received[0])
