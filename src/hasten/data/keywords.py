"""The demo's data: lines of Python's standard library with one keyword left out.

    stdlib *.py --tokenize--> `___ timeout is None:` , `if`  --by module--> train.csv, test.csv

Real code that is on every machine, about 15,000 examples and 16 classes. Which words a line holds
is not enough to know the keyword: where they stand matters. Modules of the test set are not in
the training set.
"""

from __future__ import annotations

import csv
import sysconfig
import tokenize
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from hasten.core.errors import MachineError

# fmt: off
_KEYWORDS = frozenset((
    "and", "as", "class", "def", "elif", "except", "for", "if", "import", "in", "is", "not", "or",
    "raise", "return", "while",
))
# fmt: on
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
_TEST_SHARE = 6  # one module in six is for testing
_MAX_PER_KEYWORD = 1500
_MAX_CHARACTERS = 200
_MIN_EXAMPLES = 5000

Example = tuple[str, str]


def write_keyword_files(folder: Path, library: Path | None = None) -> tuple[Path, Path]:
    """Writes train.csv and test.csv with the columns ``code`` and ``keyword``.

    Args:
        folder: where to; it must exist.
        library: folder of Python sources; the standard library by default.

    Returns:
        The two paths.

    Raises:
        MachineError: there is not enough source code (some systems ship only compiled files).
    """
    root = library or Path(sysconfig.get_paths()["stdlib"])
    # The order of a hash mixes the modules, so that no keyword's quota is filled by the first.
    found = sorted(_examples(root).items(), key=lambda item: zlib.crc32(item[0][0].encode()))
    counts: Counter[str] = Counter()
    rows: dict[str, list[Example]] = {"train.csv": [], "test.csv": []}
    for (code, keyword), module in found:
        if counts[keyword] < _MAX_PER_KEYWORD:
            counts[keyword] += 1
            in_test = zlib.crc32(module.encode()) % _TEST_SHARE == 0
            rows["test.csv" if in_test else "train.csv"].append((code, keyword))
    if counts.total() < _MIN_EXAMPLES:
        raise MachineError(
            f"{root}: only {counts.total():,} usable lines found in Python's standard library, the "
            f"demo needs {_MIN_EXAMPLES:,}; install its source files."
        )
    for name, examples in rows.items():
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["code", "keyword"])
            writer.writerows(examples)
    return folder / "train.csv", folder / "test.csv"


def _examples(root: Path) -> dict[Example, str]:
    """Returns every distinct example with the module it comes from; ambiguous lines are out."""
    modules: dict[Example, str] = {}
    answers: dict[str, set[str]] = defaultdict(set)
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if _SKIPPED & set(module.parts):
            continue
        for code, keyword in _blanked_lines(path):
            modules.setdefault((code, keyword), module.as_posix())
            answers[code].add(keyword)
    return {example: module for example, module in modules.items() if len(answers[example[0]]) == 1}


def _blanked_lines(path: Path) -> Iterator[Example]:
    """Yields each line that holds a keyword, with one of its keywords replaced by ``___``."""
    try:
        with path.open("rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
    except (OSError, SyntaxError, ValueError, tokenize.TokenError):
        return  # some of the library's files are broken on purpose
    by_line: dict[int, list[tokenize.TokenInfo]] = defaultdict(list)
    for token in tokens:
        if token.type == tokenize.NAME and token.string in _KEYWORDS:
            by_line[token.start[0]].append(token)
    for candidates in by_line.values():
        line = candidates[0].line
        if "\n" in line.rstrip("\n") or len(line) > _MAX_CHARACTERS:
            continue
        token = candidates[zlib.crc32(line.strip().encode()) % len(candidates)]
        yield (line[: token.start[1]] + "___" + line[token.end[1] :]).strip(), token.string
