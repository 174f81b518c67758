"""Makes a process of a run fail from outside, at any moment: Python runs this before the program.

    file RANK in the folder RAISE_IN --seen by a thread--> file RANK.raised, with the time
                                                       --> an exception in the main thread

The thread waits until the run is being prepared: while libraries load, an exception between any two
lines of theirs may end the process by a signal, which would be another test.
"""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path


class RaisedFromOutsideError(Exception):
    """What the main thread raises, wherever it is."""

    def __init__(self) -> None:
        super().__init__("somebody wanted it")


def wait_and_raise(order: Path, thread: int) -> None:
    """Raises in a thread once a file is there and the run has begun."""
    while not (order.exists() and "hasten.training.session" in sys.modules):
        time.sleep(0.005)
    time.sleep(0.01)
    order.with_suffix(".raised").write_text(str(time.monotonic()))
    exception = ctypes.py_object(RaisedFromOutsideError)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


if "RAISE_IN" in os.environ and "RANK" in os.environ:
    threading.Thread(
        target=wait_and_raise,
        args=(Path(os.environ["RAISE_IN"]) / os.environ["RANK"], threading.get_ident()),
        daemon=True,
    ).start()
