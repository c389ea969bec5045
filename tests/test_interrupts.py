"""Signals wait for the end of a merge, whichever they are and whatever their handler raises."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lora_fast import interrupts


class _StopError(Exception):
    pass


def stop(number: int, frame: object) -> None:
    raise _StopError


@pytest.fixture(params=["SIGINT", "SIGQUIT", "SIGXCPU", "SIGCHLD", "SIGTERM", "SIGUSR1"])
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    found: int = getattr(signal, request.param)
    before = signal.signal(found, stop)
    yield found
    signal.signal(found, before)


def test_a_signal_is_delivered_afterwards(number: int) -> None:
    finished = False
    with pytest.raises(_StopError), interrupts.held_back():
        os.kill(os.getpid(), number)
        finished = True
    assert finished
    assert signal.getsignal(number) is stop


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_handler_that_raises_early_leaves_all_as_they_were(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may come while the handlers are being replaced."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.signal(number, stop) for number in numbers]
    replace = interrupts._signal.signal
    replaced: list[int] = []

    def interrupted(number: int, handler: object) -> object:
        found = replace(number, handler)
        replaced.append(number)
        if len(replaced) == 2:
            raise error
        return found

    try:
        with monkeypatch.context() as patched:
            patched.setattr(interrupts._signal, "signal", interrupted)
            with pytest.raises(error), interrupts.held_back():
                pass
        assert len(replaced) > 2
        assert [signal.getsignal(number) for number in numbers] == [stop, stop]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


_IN_ANOTHER_THREAD = """
import _thread, sys
assert "threading" not in sys.modules  # which takes the thread that imports it for the main one
done = _thread.allocate_lock()
done.acquire()

def script():
    try:
        import torch, lora_fast as lora
        layer = lora.Linear(8, 8, r=2)
        torch.nn.init.normal_(layer.lora_B)
        base = layer.weight.detach().clone()
        assert layer.eval().merged
        assert torch.equal(layer.train().weight, base)
        print("right")
    finally:
        done.release()

_thread.start_new_thread(script, ())
done.acquire()
"""


def test_in_a_program_that_began_python_in_another_thread() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_THREAD], capture_output=True, text=True, check=False
    )
    assert done.stdout == "right\n", done.stderr
