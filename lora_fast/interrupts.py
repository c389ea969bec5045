"""Holding Ctrl-C back while a weight and what is known about it do not agree."""

# Not `signal`, whose wrappers look for enum members: 10 us a call, in every eval() and train().
import _signal  # type: ignore[import-not-found]
import threading
from types import FrameType
from typing import Any


class held_back:  # noqa: N801, it is used like a function
    """Deliver a SIGINT that comes during the body of a `with` statement after it.

    Python handles signals in the main thread only; in another thread there is nothing to hold.
    """

    # A class, as a generator would take twice as long, in every eval() and train().
    def __enter__(self) -> None:
        """Put a handler that takes note in the place of the one that is set."""
        self.received: list[tuple[int, FrameType | None]] = []
        self.handler: Any = None
        if threading.get_ident() != threading.main_thread().ident:
            return
        handler = _signal.getsignal(_signal.SIGINT)
        if not callable(handler):  # ignored, the system's own, or not Python's
            return
        self.handler = handler
        _signal.signal(_signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append((number, frame))

    def __exit__(self, *error: object) -> None:
        """Set the handler again, and call it if there was a SIGINT, after an error too."""
        if self.handler is None:
            return
        _signal.signal(_signal.SIGINT, self.handler)
        if self.received:
            self.handler(*self.received[0])
