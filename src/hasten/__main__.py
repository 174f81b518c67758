"""The command's first moments: `python -m hasten` and the script `hasten` begin here.

    these lines: what signals do --> the command's imports, which take a while --> the command

Until the command listens for Ctrl-C and SIGTERM itself there is nothing to put in order, so the
process ends at once. It does not raise: Python ignores errors in some callbacks of imports, and
others would end in a traceback.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def _stop(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, b"hasten: stopped; nothing half-done is kept.\n")
    finally:
        os._exit(128 + number)


for _number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(_number) is not signal.SIG_IGN:  # nohup, or a shell's background
        signal.signal(_number, _stop)

# torch warns of connections with pages of C++ frames; our errors name rank, host and cause.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from hasten.cli.main import main as command  # noqa: E402 - it is what takes a while
from hasten.parallel.heartbeat import beating  # noqa: E402


def main() -> None:
    """Runs the command and ends the process with its exit code."""
    try:
        with beating():
            command()
    finally:
        # What has been said stands: a signal while Python ends adds no word to it.
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is _stop:
                signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
