"""Keeping signals and forks out of what must be done as a whole."""

# Not `signal`, whose wrappers look for enum members: 10 us a call, in every eval() and train().
import _signal  # type: ignore[import-not-found]
import itertools
import os
import threading
from types import FrameType
from typing import Any, TypeVar

Lock = TypeVar("Lock", bound=Any)

# What somebody may have set a handler for that raises: Ctrl-C, a time limit, a preempted job. Not
# the real-time ones, half of all, as each takes 0.1 us to ask for.
_LAST = getattr(_signal, "SIGRTMIN", _signal.NSIG)
_SIGNALS = tuple(number for number in _signal.valid_signals() if number < _LAST)


def free_in_children(lock: Lock) -> Lock:
    """Return the lock, which a fork now waits for.

    A child has none of the other threads: what one of them had begun, nobody there would end.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )
    return lock


# Merging and unmerging is seldom and short: one lock for all layers keeps them picklable.
merge_lock = free_in_children(threading.RLock())


class held_back:  # noqa: N801, it is used like a function
    """Deliver a signal that comes during the body of a `with` statement after it.

    Python handles signals in the main thread only; in another thread there is nothing to hold.
    """

    # A class, as a generator would take twice as long, in every eval() and train().
    def __enter__(self) -> None:
        """Put a handler that takes note in the place of each that is set."""
        self.received: dict[int, FrameType | None] = {}
        self.handlers: dict[int, Any] = {}
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            handlers = list(map(_signal.getsignal, _SIGNALS))
            found = zip(_SIGNALS, handlers, strict=True)
            # Those that are not callable are ignored, the system's own, or not Python's.
            for number, handler in itertools.compress(found, map(callable, handlers)):
                self.handlers[number] = handler
                _signal.signal(number, self._note)
        except BaseException as error:
            if isinstance(error, ValueError) and not self._has_replaced():
                # In a program that began Python in another thread, which then handles them.
                self.handlers.clear()
                return
            self._restore()  # it came from a handler that was still to be replaced
            raise

    def _has_replaced(self) -> bool:
        return any(_signal.getsignal(number) == self._note for number in self.handlers)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.setdefault(number, frame)

    def __exit__(self, *error: object) -> None:
        """Set the handlers again, and call those whose signal came, after an error too."""
        self._restore()
        if self.received:
            # Ctrl-C last, as what is raised last is what the caller sees.
            self._deliver(sorted(self.received.items(), key=lambda it: it[0] == _signal.SIGINT))

    def _restore(self) -> None:
        left = dict(self.handlers)
        try:
            while left:
                number, handler = next(iter(left.items()))
                _signal.signal(number, handler)
                del left[number]
        finally:  # a handler that is set again may be called at once, and raise
            for number, handler in left.items():
                _signal.signal(number, handler)

    def _deliver(self, received: list[tuple[int, FrameType | None]]) -> None:
        for i, (number, frame) in enumerate(received):
            try:
                self.handlers[number](number, frame)
            except BaseException:
                self._deliver(received[i + 1 :])
                raise
