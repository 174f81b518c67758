"""Each family of pretrained models beside transformers: the largest relative differences.

    small random models of transformers --save_pretrained--> hasten: scores, loss, gradients
    hasten --model folder--> transformers: scores

Batches are ragged, padded there and packed here; all is in float32. The cases are those of the
parity tests, and a family without a case is an error. ``--markdown`` prints the table of the docs.

    python benchmarks/parity.py [--markdown] [--output FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "parity")]

from machine import describe_machine, keep, say  # noqa: E402 - found by the line above
from pretrained_cases import Parity, compare  # noqa: E402
from pretrained_decoders import CASES as DECODERS  # noqa: E402
from pretrained_encoder_decoders import CASES as ENCODER_DECODERS  # noqa: E402
from pretrained_encoders import CASES as ENCODERS  # noqa: E402

from hasten.model.pretrained.registry import FAMILIES  # noqa: E402

CASES = [*ENCODERS, *DECODERS, *ENCODER_DECODERS]


def main() -> None:
    """Runs all cases and prints a line for each transformers class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--markdown", action="store_true", help="print the table of the docs")
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    families = {name for family in FAMILIES for name in family.classes.values()}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(case, Path(folder))
        row = rows.setdefault(case.kind, {"cases": 0, **asdict(Parity(0.0, 0.0, 0.0, 0.0))})
        row["cases"] += 1
        for name, value in asdict(found).items():
            row[name] = max(row[name], value)
        say(f"{case.name}: {found}")
    untested = families - rows.keys()
    if untested:
        sys.exit(f"no case for {', '.join(sorted(untested))}")
    print_table(rows, arguments.markdown)
    result = {"benchmark": "parity", "machine": describe_machine(1), "classes": rows}
    keep(result, arguments.output)


def print_table(rows: dict[str, dict[str, Any]], as_markdown: bool) -> None:
    names = ["outputs", "loss", "gradients", "back"]
    if as_markdown:
        print(f"| transformers class | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
        for kind, row in rows.items():
            print(f"| {kind} | {' | '.join(f'{row[name]:.0e}' for name in names)} |")
        return
    print(f"{'':40} {' '.join(f'{name:>10}' for name in names)}")
    for kind, row in rows.items():
        print(f"{kind:40} {' '.join(f'{row[name]:10.1e}' for name in names)}")


if __name__ == "__main__":
    main()
