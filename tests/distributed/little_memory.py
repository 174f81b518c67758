"""`hasten train` in a process that finds as much memory as it is told, or may not look at all.

python little_memory.py BYTES|unasked train ARGUMENTS
"""

from __future__ import annotations

import sys
from typing import Any

from hasten.__main__ import main
from hasten.parallel import resources

if __name__ == "__main__":
    told = sys.argv.pop(1)

    def free(device: Any, num_local: int) -> int:
        """Stands for what is free."""
        del device, num_local
        assert told.isdigit(), "memory is measured again"
        return int(told)

    resources.available_memory = free
    main()
