"""The demo's data: real lines, each with one keyword left out, and no leak between its files."""

from __future__ import annotations

import csv
import io
import keyword
import os
import subprocess
import sys
import sysconfig
import tokenize
from collections import Counter
from pathlib import Path

import pytest

from hasten.core.errors import MachineError
from hasten.data.keywords import _KEYWORDS, _blanked_lines, _examples, write_keyword_files

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
_FILLER = "\n".join(f"while name_{i} in (1, {i}): pass" for i in range(6000))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], str]]:
    """The folder of the files, and the module that each example was taken from."""
    folder = tmp_path_factory.mktemp("keywords")
    kept = {}

    def remember(root: Path) -> dict[tuple[str, str], str]:
        kept.update(_examples(root))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.data.keywords._examples", remember)
        paths = write_keyword_files(folder)
    assert paths == (folder / "train.csv", folder / "test.csv")
    return folder, kept


@pytest.fixture(scope="module")
def folder(made: tuple[Path, dict[tuple[str, str], str]]) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[tuple[str, str]]]:
    found = {}
    for name in ("train", "test"):
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
        assert header == ["code", "keyword"]
        found[name] = [(code, word) for code, word in lines]
    return found


def test_there_are_enough_examples_of_every_class(rows):
    train, test = (Counter(word for _, word in rows[name]) for name in ("train", "test"))
    assert len(rows["train"]) + len(rows["test"]) >= 5000
    assert set(train) == set(test) == _KEYWORDS and len(_KEYWORDS) == 16
    assert min(train.values()) >= 100 and min(test.values()) >= 20
    share = len(rows["test"]) / (len(rows["train"]) + len(rows["test"]))
    assert 0.08 < share < 0.3
    assert max((train + test).values()) <= 1500
    assert all(keyword.iskeyword(word) for word in _KEYWORDS)


def test_no_line_is_ambiguous_or_in_both_files(rows):
    both = rows["train"] + rows["test"]
    assert len({code for code, _ in both}) == len(both)


def test_every_line_is_real(rows, made):
    """With the keyword put back it stands in its module, letter for letter."""
    lines: dict[str, set[str]] = {}
    for example in rows["train"] + rows["test"]:
        module, (code, word) = made[1][example], example
        if module not in lines:
            with tokenize.open(LIBRARY / module) as file:
                lines[module] = {line.strip() for line in file}
        blanks = [at for at in range(len(code)) if code.startswith("___", at)]
        assert any(code[:at] + word + code[at + 3 :] in lines[module] for at in blanks), example
        assert code == code.strip() and "\n" not in code
    assert len(lines) > 300


def test_no_module_is_in_both_files(rows, made):
    train, test = ({made[1][example] for example in rows[name]} for name in ("train", "test"))
    assert len(train) > 200 and len(test) > 40 and not train & test
    parts = {part for module in train | test for part in Path(module).parts}
    assert not parts & {"site-packages", "test", "tests", "idlelib"}


def test_the_files_are_the_same_in_every_process(folder: Path, tmp_path: Path):
    script = "import sys; from pathlib import Path; from hasten.data.keywords import *; "
    script += "write_keyword_files(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, env=environment)
    for name in ("train.csv", "test.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_blank_is_where_a_keyword_was(rows):
    """As Python reads the line: not inside a string, a comment or a longer name."""
    checked = 0
    for code, word in rows["test"]:
        if code.count("___") != 1 or code.rstrip().endswith((":", "\\", "(", ",", "[", "{")):
            continue
        restored = code.replace("___", word)
        start = code.index("___")
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(restored + "\n").readline))
        except (tokenize.TokenError, IndentationError):
            continue
        assert any(
            t.type == tokenize.NAME and t.string == word and t.start == (1, start) for t in tokens
        ), restored
        checked += 1
    assert checked > 300


def blanked(tmp_path: Path, source: str) -> list[tuple[str, str]]:
    path = tmp_path / "m.py"
    path.write_text(source)
    return list(_blanked_lines(path))


def test_one_keyword_of_a_line_is_left_out(tmp_path: Path):
    assert blanked(
        tmp_path, "    return x  # if\n" if False else "if x:\n    return 'if'  # or\n"
    ) == [
        ("___ x:", "if"),
        ("___ 'if'  # or", "return"),
    ]
    ((code, word),) = blanked(tmp_path, "x = a if b not in c else d\n")
    assert code.replace("___", word) == "x = a if b not in c else d" and word in _KEYWORDS
    assert blanked(tmp_path, "x = '''\nif\n'''\nfortune = notes\n") == []
    assert blanked(tmp_path, "y = x in (1,\n 2)\n") == [("y = x ___ (1,", "in")]
    assert blanked(tmp_path, f"if {'x' * 300}: pass\n") == []
    assert blanked(tmp_path, "if x:\n    y\n  z\n") == []  # not Python: left out in silence
    (tmp_path / "m.py").write_bytes(b"# coding: latin-1\nx = '\xe9' if y else z\n")
    assert list(_blanked_lines(tmp_path / "m.py")) == [("x = 'é' ___ y else z", "if")]
    (tmp_path / "m.py").write_bytes(b"x = '\xe9' if y else z\n")
    assert list(_blanked_lines(tmp_path / "m.py")) == []  # not UTF-8, as it should be


def test_a_line_that_two_keywords_fit_is_left_out(tmp_path: Path):
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    (library / "a.py").write_text("if ready:\n    pass\nx = y in z\n" + _FILLER)
    (library / "b.py").write_text("while ready:\n    pass\nx = y in z\n")
    (library / "test" / "c.py").write_text("if never:\n    pass\n")
    found = _examples(library)
    assert not [example for example in found if example[0] == "___ ready:"]
    assert found["x = y ___ z", "in"] == "a.py"  # the first module, in alphabetical order
    assert not [example for example in found if "never" in example[0]]


def test_too_little_source_code_is_said(tmp_path: Path):
    (tmp_path / "a.py").write_text("if x:\n    pass\n")
    with pytest.raises(MachineError, match=r"only 1 usable lines.*needs 5,000; install") as caught:
        write_keyword_files(tmp_path, library=tmp_path)
    assert str(tmp_path) in str(caught.value) and caught.value.exit_code == 8
    assert [path.name for path in tmp_path.iterdir()] == ["a.py"]
