"""One of several processes: runs cases and leaves what it found where the test looks for it.

python layout_worker.py FOLDER      cases.json -> found.json, found.safetensors
"""

from __future__ import annotations

import faulthandler
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from layout_cases import Case
from layout_runs import run_case
from safetensors.torch import save_file

from hasten.parallel.world import joined

# Processes that wait for each other would wait for ever.
_SECONDS = 900


def main(folder: Path) -> None:
    """Runs every case in its layout; rank 0 writes."""
    faulthandler.dump_traceback_later(_SECONDS, exit=True)
    torch.set_num_threads(1)
    cases = [Case(**case) for case in json.loads((folder / "cases.json").read_text())]
    found, tensors = [], {}
    with joined("auto", None, "cpu") as world:
        for number, case in enumerate(cases):
            try:
                one = run_case(case, folder.parent, folder / f"case-{number}", world)
            except Exception as error:
                error.add_note(f"in {case}, rank {world.rank}")
                raise
            for name, tensor in one.tensors.items():
                tensors[f"{number}/{name}"] = tensor.contiguous().clone()
            one.tensors = {}
            found.append(asdict(one))
        if world.is_main:
            save_file(tensors, folder / "found.safetensors")
            (folder / "found.json").write_text(json.dumps(found))
        world.gather(None)  # none leaves before the others are done


if __name__ == "__main__":
    main(Path(sys.argv[1]))
