"""The launcher ends by a signal, whichever of its threads the system gives it to."""

import signal
import subprocess
import sys

import pytest

GIVEN_TO_ANOTHER_THREAD = """
import os, signal, sys, threading, time
from serving.cluster.launch import _interruptible, _wait_for_signals

number = signal.Signals(int(sys.argv[1]))

def ask():
    while not os.read(begun, 1): pass
    time.sleep(0.3)
    os.kill(os.getpid(), number)
    time.sleep(60)

begun, begin = os.pipe()
threading.Thread(target=ask, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {number})
with _interruptible():
    os.write(begin, b".")
    try:
        _wait_for_signals()
    except KeyboardInterrupt:
        print("ended", signal.getsignal(number) is signal.SIG_IGN)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_another_thread_gets_ends_the_wait(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_TO_ANOTHER_THREAD, str(int(number))],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (0, "ended True\n"), done.stderr
