"""One of several processes that nobody watches but they themselves: sums, until it is ended.

python watched_worker.py [RANK that fails after a few sums]
"""

from __future__ import annotations

import sys
import time

import torch

from hasten.core.errors import HastenError
from hasten.parallel.world import joined


def main() -> None:
    """Sums with the others; says what a person would be told."""
    failing = int(sys.argv[1]) if len(sys.argv) > 1 else -1
    try:
        with joined("auto", None, "cpu", timeout_seconds=3.0) as world:
            for number in range(1_000_000):
                world.sum(torch.ones(3))
                if number == 3 and world.rank == failing:
                    raise ArithmeticError("this does not add up")
                if number == 3 and world.is_main:
                    print("begun", flush=True)
                time.sleep(0.01)
    except HastenError as error:
        print(f"hasten: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
