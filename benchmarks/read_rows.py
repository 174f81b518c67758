"""How fast, and in how much memory, a large CSV file is inspected.

    docstrings of the standard library -> sentences, recombined -> CSV file -> child: inspect_file
                                                                                     |
                                                     rows per second, peak memory -> JSON

The file is inspected in a child process, so that writing it does not count; the peak is the one
above what the process held after its imports.

    python benchmarks/read_rows.py [--rows 1000000] [--output FILE]
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SEED = 0


def peak_memory_bytes() -> int:
    """Returns the highest resident memory of this process so far.

    Linux keeps it in VmHWM; ``ru_maxrss`` would include that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def sentences_by_package() -> dict[str, list[str]]:
    """Returns the sentences of the docstrings of each package of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    sentences: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                found = [s for s in re.split(r"(?<=[.!?]) ", text) if 20 <= len(s) <= 150]
                sentences.setdefault(parts[0].removesuffix(".py"), []).extend(found)
    return {package: found for package, found in sentences.items() if len(found) >= 50}


def write_file(path: Path, num_rows: int) -> None:
    sentences = sentences_by_package()
    packages = sorted(sentences)
    rng = random.Random(SEED)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label"])
        for _ in range(num_rows):
            package = rng.choice(packages)
            text = " ".join(rng.choices(sentences[package], k=rng.choice((1, 2, 2))))
            writer.writerow([text, package])


def inspect_in_this_process(path: str) -> None:
    """What the child does: imports, then inspects, then prints what it cost."""
    from hasten.data.inspection import inspect_file

    after_imports = peak_memory_bytes()
    found = inspect_file(path)
    result = {
        "num_rows": found.num_rows,
        "num_used": found.num_used,
        "num_classes": found.num_classes,
        "mean_characters": found.characters.mean if found.characters else None,
        "num_duplicates": found.num_duplicates,
        "seconds": round(found.seconds, 3),
        "rows_per_second": round(found.rows_per_second),
        "memory_after_imports_bytes": after_imports,
        "peak_above_imports_bytes": peak_memory_bytes() - after_imports,
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rows")
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        inspect_in_this_process(arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        write_file(path, arguments.rows)
        child = subprocess.run(
            [sys.executable, __file__, "--child", str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
        result = {
            "benchmark": "read_rows",
            "file_bytes": path.stat().st_size,
            **json.loads(child.stdout),
            "machine": {
                "system": platform.platform(terse=True),
                "processor": platform.machine(),
                "num_cores": os.cpu_count(),
                "python": platform.python_version(),
            },
        }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
