"""Being told to stop: noted where something can be saved, at once elsewhere, and over in time whatever happens."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from diffdpo.errors import RESUMABLE, Stopped
from diffdpo.training.stop import StopRequest, stop_on_signals
from tests.support.paths import ROOT


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)


def test_in_training_a_signal_is_noted_and_elsewhere_it_acts_at_once():
    with stop_on_signals(StopRequest(seconds=60)) as request:
        with request.set_deferred(True):
            send(signal.SIGTERM)
            assert request.asked.is_set() and 0 < request.remaining() <= 60
            with pytest.raises(Stopped), request.set_deferred(False):
                raise AssertionError("an evaluation that begins after the signal must not begin")
            send(signal.SIGTERM)  # a second one changes nothing
        request.ended.set()
    with stop_on_signals(StopRequest(seconds=60)) as request:
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
        request.ended.set()


def test_a_second_ctrl_c_ends_at_once_and_the_handlers_before_come_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals(StopRequest()) as request, request.set_deferred(True):
        send(signal.SIGINT)
        assert request.asked.is_set() and request.remaining() == float("inf"), "a person may wait for the step"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("busy", ["while True: pass", "[ctypes.CDLL(None).pause() for _ in range(9)]"])
def test_a_step_that_does_not_end_is_given_up_in_time(busy):
    """Also where the main thread waits in C, where Python's handlers do not run."""
    code = f"""
        import ctypes
        from diffdpo.training.stop import StopRequest, stop_on_signals
        with stop_on_signals(StopRequest(seconds=2)) as request, request.set_deferred(True):
            print("ready", flush=True)
            {busy}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == RESUMABLE and "not done within 2 s" in out
    assert 1 < time.monotonic() - sent < 10
