"""What a person gets wrong ends in one or two lines and an exit code, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

import hasten
from builders import labelled_rows, write_rows
from conftest import Ended
from hasten.cli.main import main
from hasten.core.errors import DamagedError, DataError, HastenError, MachineError, UsageError
from pretrained_folders import write_bert, write_tokenizer

TINY = [
    *("--model.num_layers", "1", "--model.hidden_size", "16", "--model.num_heads", "2"),
    *("--epochs", "1", "--eval.baseline", "false"),
]
USAGE, DATA, DAMAGED, MACHINE = 2, 3, 4, 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv and a finished run of it."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "train.csv", labelled_rows(60), ("text", "label"))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(folder / "train.csv"), *TINY, "-o", str(folder / "run"), "--quiet"])
    assert ended.value.code == 0
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tree(folder: Path) -> dict[str, bytes | None]:
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


def assert_refused(ended: Ended, code: int, *parts: str) -> str:
    """One or two lines on standard error, nothing on standard output; returns the lines."""
    assert ended.code == code, ended.err
    assert ended.out == "" and "Traceback" not in ended.err
    before, found, message = ended.err.rpartition("hasten: ")
    assert found and (before == "" or before.endswith("\n")), ended.err
    assert message.endswith((".\n", "?\n", "--help\n", "--resume run\n")), message
    assert message.count("\n") <= 2 and len(message) < 420, message
    for part in parts:
        assert part in message, (part, message)
    assert (
        "..." not in message.replace(" ...", "")
        and " None" not in message
        and ".." not in (message.replace("...", ""))
    ), message
    return message


def assert_clean(*folders: Path) -> None:
    for folder in folders:
        left = [str(p) for p in folder.rglob("*") if ".partial" in p.name or "stdin-" in p.name]
        assert not left, left


LINES = [f"some text {i},{'ab'[i % 2]}" for i in range(40)]
GOOD = "\n".join(["text,label", *LINES]) + "\n"

# name of the file -> its content, and what is said of it
UNREADABLE: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty.csv": (b"", ("empty.csv: is empty",)),
    "blank.csv": (b"\xef\xbb\xbf \r\n\n", ("blank.csv: is empty",)),
    "header.csv": (
        b"text,label\n",
        ("only a header (text, label) and no rows", "--data.header"),
    ),
    "binary.csv": (b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 4, ("is not text",)),
    "table.xlsx": (b"PK\x03\x04" + bytes(300), ("table.xlsx", "CSV")),
    "latin.csv": (
        GOOD.encode() + "café,a\n".encode("latin-1"),
        ("latin.csv, line 42", "0xe9", "not utf-8", "--data.encoding latin-1"),
    ),
    "quote.csv": (
        GOOD.encode() + b'"never closed,a\nmore,b\n',
        ("quote.csv, line 42", "a quote opens here and is never closed", "close it"),
    ),
    "cut.csv.gz": (gzip.compress(GOOD.encode() * 50)[:-40], ("cut.csv.gz", "ends too early")),
    "lines.jsonl": (b"text,label\na,b\n", ("lines.jsonl, line 1", "not JSON")),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read(name: str, trained: Path, own_cache: Path, tmp_path, cli):
    content, parts = UNREADABLE[name]
    Path(name).write_bytes(content)
    before = tree(tmp_path)
    for arguments in (
        ["train", name, *TINY],
        ["train", trained / "train.csv", "--test", name, *TINY],
        ["train", trained / "train.csv", "--validation", name, *TINY, "--dry-run"],
        ["inspect", name],
        ["evaluate", trained / "run", name],
        ["predict", trained / "run", "--input", name, "-o", "out.csv"],
        ["predict", trained / "run", "--input", name, "-o", "out.jsonl.gz", "--json"],
    ):
        assert_refused(cli(*arguments), DATA, *parts)
        assert tree(tmp_path) == before
        assert_clean(own_cache)


def test_a_file_that_is_not_there(trained: Path, own_cache: Path, tmp_path: Path, cli):
    Path("train.csv").write_text(GOOD)
    Path("folder").mkdir()
    Path("folder/data.tsv").write_text("a\tb\n")
    before = tree(tmp_path)
    for name, parts in (
        ("trian.csv", ("trian.csv: there is no such file", "Did you mean 'train.csv'?")),
        ("nowhere/x.csv", ("nowhere/x.csv", "There is no folder 'nowhere'")),
        ("folder", ("folder: is a folder", "pass a file in it: data.tsv")),
        ("/dev/null", ("/dev/null", "pass '-'")),
    ):
        for arguments in (
            ["train", name],
            ["inspect", name],
            ["evaluate", trained / "run", name],
            ["predict", trained / "run", "--input", name, "-o", "out.csv"],
        ):
            assert_refused(cli(*arguments), DATA, *parts)
    assert tree(tmp_path) == before
    assert_clean(own_cache)


def rows(*lines: str) -> bytes:
    return ("\n".join(lines) + "\n").encode()


UNUSABLE: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "one class": (
        rows("text,label", *(f"some text {i},same" for i in range(30))),
        ("every row has the label 'same' in column 'label'", "at least two classes"),
    ),
    "all unique": (
        rows("text,label", *(f"some text,name{i}" for i in range(30))),
        ("label column 'label' has a different value in each of 30 rows", "--label-column"),
    ),
    "no text": (
        rows("a,b", *(f"{i},{i % 2}" for i in range(30))),
        ("no column looks like the text", "'a' (whole numbers", "--text-column"),
    ),
    "floats": (
        rows("text,score", *(f"some text {i},0.{i}" for i in range(30))),
        ("holds decimal numbers (0.0, line 2)", "regression is another task"),
    ),
    "several labels": (
        rows("text,label", *(f"some text {i},{'a|b' if i % 3 else 'a'}" for i in range(30))),
        ("several labels in a cell (a|b, line 3)", "multi-label is another task"),
    ),
    "too many rejected": (
        rows("text,label", *LINES, *("x,y,z" for _ in range(5))),
        ("5 of 45 rows cannot be used", "the 10% allowed", "--data.max_rejected_fraction",
         "The first: line 42: 3 cells where the header has 2"),
    ),
    "empty labels": (
        rows("text,label", *(f"some text {i}," for i in range(30))),
        ("no column looks like the label", "'label' (empty)", "--label-column"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_data_that_cannot_be_learned_from(name: str, own_cache: Path, tmp_path: Path, cli):
    content, parts = UNUSABLE[name]
    Path("train.csv").write_bytes(content)
    before = tree(tmp_path)
    for more in ([], ["--dry-run"], ["--json"], ["-o", "deep/run"]):
        message = assert_refused(cli("train", "train.csv", *TINY, *more), DATA, *parts)
        assert message.startswith("train.csv: ")
        assert tree(tmp_path) == before
        assert_clean(own_cache)
    with pytest.raises(DataError) as caught:
        hasten.train("train.csv")
    assert message == f"{caught.value}\n"


def test_ten_percent_rejected_is_a_warning_and_the_bound_can_be_moved(cli):
    Path("train.csv").write_bytes(rows("text,label", *LINES[:36], *("x,y,z" for _ in range(4))))
    ended = cli("train", "train.csv", *TINY, "--quiet")
    assert ended.code == 0
    assert (
        "warning: train.csv: 40 rows read, 36 used, 4 rejected (first: line 38: 3 cells where the "
        "header has 2)"
    ) in ended.err
    rejected = Path("runs/train-1/rejected.jsonl").read_text().splitlines()
    reason = "3 cells where the header has 2"
    assert [json.loads(line) for line in rejected] == [
        {"file": "train.csv", "line": n, "reason": reason} for n in range(38, 42)
    ]
    strict = cli("train", "train.csv", *TINY, "--data.max_rejected_fraction", "0.05")
    assert_refused(strict, DATA, "4 of 40 rows", "the 5% allowed")


# command line -> what is said of it
WRONG_USE: dict[str, tuple[str, ...]] = {
    "train": ("there is no training file: hasten train FILE",),
    "train train.csv --epoch 3": ("--epoch. Did you mean '--epochs'?",),
    "train train.csv --zzz": ("--zzz", "hasten train --help"),
    "train train.csv --train.epoch 3": ("--train.epoch. Did you mean 'train.epochs'?",),
    "train train.csv --train.learning-rate=3": ("Did you mean 'train.learning_rate'?",),
    "train train.csv --Optim.schedule x": ("Did you mean 'optim.schedule'?",),
    "trian train.csv": ("No such command 'trian'. Did you mean 'train'?",),
    "train train.csv --epochs 3x": (
        "train.epochs: '3x' does not fit: it should be a number greater than 0, or 'auto'.",
    ),
    "train train.csv --epochs 0": ("train.epochs: '0'", "greater than 0"),
    "train train.csv --epochs inf": ("train.epochs: 'inf'", "a finite number greater"),
    "train train.csv --train.learning_rate -1": ("train.learning_rate: '-1'",),
    "train train.csv --optim.schedule cosin": ("optim.schedule: 'cosin'", "'cosine'"),
    "train train.csv --seed x": ("train.seed: 'x'", "a whole number of at least 0."),
    "train train.csv --train.epochs": ("--train.epochs needs a value",),
    "train train.csv --epochs 1 --train.epochs 2": ("train.epochs is given twice",),
    "train train.csv --preset smal": ("there are tiny, small, base", "'small'?"),
    "train train.csv --task translate": ("unknown task 'translate'", "'translation'?"),
    "train train.csv --tokenizer bpee": ("bpee: neither a file nor", "'bpe'?"),
    "train train.csv --device gpu": ("train.device: 'gpu'", "'cpu'"),
    "predict RUN hi --device xpu": ("--device xpu", "cuda"),
    "inspect train.csv more.csv": ("(more.csv)",),
    "train train.csv -c none.yaml": ("none.yaml: no such configuration file",),
    "train train.csv -c key.yaml": ("'train.epoch'", "'train.epochs'?"),
    "train train.csv -c form.yaml": ("form.yaml, line 3", "not valid YAML"),
    "train train.csv --text-column txt": ("no column 'txt'", "'text'?", "'label'"),
    "train train.csv --label-column 7": ("no column '7'",),
    "train train.csv --text-column 2 --label-column label": ("cannot be both",),
    "train train.csv --data.delimiter ab": ("'ab'", "'tab'"),
    "train train.csv --data.encoding utf-88": ("'utf-88'", "utf-8"),
    "train train.csv --model.num_heads 3 --model.hidden_size 16": (
        "model.hidden_size 16",
        "model.num_heads 3",
    ),
    "predict RUN hi --max-new-tokens 3x": ("--max-new-tokens: '3x'", "a whole number. See"),
    "predict RUN hi --top-p x": ("--top-p: 'x' does not fit: it should be a number. See",),
    "predict RUN": ("give either texts or --input FILE",),
    "predict RUN hi --input train.csv": ("give either",),
    "predict RUN --input train.csv": ("--input and --output go together",),
    "predict RUN --input train.csv -o o.xlsx": ("o.xlsx", ".csv, .tsv, .jsonl"),
    "predict RUN --input train.csv -o no/o.csv": ("no folder no",),
    "predict RUN --input train.csv -o d.csv": ("d.csv: is a folder",),
    "predict RUN '-5 degrees'": ("Put -- before a text that begins with a dash",),
    "predict RUN hi --text-column 1": ("--text-column", "--input"),
    "predict nowhere hi": ("nowhere: no such run folder",),
    "evaluate d.csv train.csv": ("d.csv is not a run folder",),
    "evaluate RUN other.csv": (
        "other.csv: there is no column 'text'",
        "'comment', 'label'",
        "--text-column",
    ),
    "evaluate RUN texts.csv": ("texts.csv: there is no column 'label'", "--label-column"),
    "predict RUN --input other.csv -o o.csv": (
        "other.csv: there is no column 'text'",
        "--text-column",
    ),
    "evaluate RUN train.csv --train.epochs 2": ("is for training",),
    "demo --train.epochs 2": ("demo takes no settings",),
    "evaluate RUN": ("Missing argument 'FILE", "hasten evaluate --help"),
    "train --resume nowhere": ("nowhere is not a run folder",),
    "train --resume d.csv": ("d.csv is not a run folder",),
    "train train.csv --resume RUN": ("--resume", "give it alone"),
    "train --resume RUN --epochs 9": ("give it alone",),
    "train --resume RUN --train.l1 9": ("give it alone",),
    "train --resume RUN -o x": ("give it alone",),
    "train train.csv -o RUN": ("exists already", "--output", "--resume"),
    "train train.csv -o d.csv": ("d.csv exists already: choose another",),
    "train train.csv -o train.csv/run": ("train.csv is a file, not a folder",),
    "demo -o d.csv": ("d.csv exists already",),
}


@pytest.mark.parametrize("command", WRONG_USE)
def test_wrong_use(command: str, trained: Path, own_cache: Path, tmp_path: Path, cli):
    Path("train.csv").write_text(GOOD)
    Path("other.csv").write_text(GOOD.replace("text,label", "comment,label", 1))
    Path("texts.csv").write_text("text\nan owl\na saw\n")
    Path("key.yaml").write_text("train:\n  epoch: 3\n")
    Path("form.yaml").write_text("train:\n  epochs: [3\n")
    Path("d.csv").mkdir()
    before, run = tree(tmp_path), tree(trained / "run")
    arguments = [trained / "run" if word == "RUN" else word for word in shlex.split(command)]
    assert_refused(cli(*arguments), USAGE, *WRONG_USE[command])
    assert tree(tmp_path) == before and tree(trained / "run") == run
    assert_clean(own_cache)


def test_debug_shows_where_and_changes_nothing_else(cli):
    short, long = cli("inspect", "none.csv"), cli("--debug", "inspect", "none.csv")
    assert short.code == long.code == cli("inspect", "none.csv", "--debug").code == DATA
    assert "Traceback" not in short.err and "Traceback (most recent call last)" in long.err
    assert "DataError" in long.err and long.err.endswith(short.err)


def test_a_defect_of_ours_says_so(cli, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("what a mess")

    monkeypatch.setattr("hasten.data.inspection.inspect_file", broken)
    ended = cli("inspect", "a.csv")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == (
        "hasten: ZeroDivisionError: what a mess\nThis is a defect of hasten; --debug shows where.\n"
    )
    assert "broken" in cli("inspect", "a.csv", "--debug").err


def test_no_cuda_device_is_the_machines_fault(cli, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("train.csv").write_text(GOOD)
    before = tree(tmp_path)
    for more in ([], ["--dry-run"]):
        ended = cli("train", "train.csv", *TINY, "--device", "cuda", *more)
        assert_refused(ended, MACHINE, "--device cuda", "no CUDA device", "--device cpu")
    assert tree(tmp_path) == before


def test_labels_that_are_all_unseen(trained: Path, cli):
    Path("in.csv").write_text(GOOD)
    ended = cli("evaluate", trained / "run", "in.csv")
    assert_refused(ended, DATA, "in.csv: no label in column 'label' (a, b)", "bird, fruit, tool")
    with pytest.raises(DataError, match="--label-column"):
        hasten.load(trained / "run").evaluate("in.csv")


def test_standard_input_with_nothing_in_it(trained: Path, cli, own_cache: Path, monkeypatch):
    import io
    import sys
    import types

    for arguments in (
        ["train", "-"],
        ["inspect", "-"],
        ["evaluate", trained / "run", "-"],
        ["predict", trained / "run", "--input", "-", "-o", "o.csv"],
    ):
        empty = types.SimpleNamespace(buffer=io.BytesIO(b""), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", empty)
        assert_refused(cli(*arguments), DATA, "standard input is empty")
        terminal = types.SimpleNamespace(buffer=io.BytesIO(b""), isatty=lambda: True)
        monkeypatch.setattr(sys, "stdin", terminal)
        assert_refused(cli(*arguments), USAGE, "nothing is piped into it")
    assert_clean(own_cache)
    assert not Path("runs").exists() and not Path("o.csv").exists()


# Damaged models


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_part(path: Path, part: str, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, part: {**values[part], **changes}}))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of the weights": ("model.safetensors", flip),
    "a bit of the tokenizer": ("tokenizer.json", flip),
    "weights cut": ("model.safetensors", truncate),
    "weights longer": ("model.safetensors", grow),
    "weights empty": ("model.safetensors", lambda path: path.write_bytes(b"")),
    "weights gone": ("model.safetensors", Path.unlink),
    "config gone": ("config.json", Path.unlink),
    "config changed": ("config.json", lambda path: rewrite(path, hidden_size=32)),
    "ours gone": ("hasten.json", Path.unlink),
    "ours cut": ("hasten.json", truncate),
    "ours empty": ("hasten.json", lambda path: path.write_text("{}")),
    "ours a list": ("hasten.json", lambda path: path.write_text("[]")),
    "other version": ("hasten.json", lambda path: rewrite(path, format_version=2)),
    "other shape": (
        "hasten.json",
        lambda path: rewrite_part(path, "architecture", hidden_size=32),
    ),
    "other depth": ("hasten.json", lambda path: rewrite_part(path, "architecture", num_layers=2)),
    "other option": ("hasten.json", lambda path: rewrite_part(path, "architecture", new=2)),
    "no labels": ("hasten.json", lambda path: rewrite_part(path, "task_options", id2label={})),
    "labels of wrong form": (
        "hasten.json",
        lambda path: rewrite_part(path, "task_options", id2label=["a", "b"]),
    ),
    "tokenizer gone": ("tokenizer.json", Path.unlink),
    "tokenizer cut": ("tokenizer.json", truncate),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model(name: str, trained: Path, cli):
    file, damage = DAMAGE[name]
    shutil.copytree(trained / "run", "run")
    damage(Path("run/model") / file)
    for arguments in (
        ["predict", "run", "hi"],
        ["evaluate", "run", trained / "train.csv", "--json"],
    ):
        assert_refused(cli(*arguments), DAMAGED, "run/model")
    with pytest.raises(DamagedError, match="--resume run"):
        hasten.load("run")


def test_what_is_advised_for_a_damaged_model_works(trained: Path, cli):
    shutil.copytree(trained / "run", "run")
    whole = tree(Path("run/model"))
    truncate(Path("run/model/model.safetensors"))
    advice = assert_refused(cli("predict", "run", "hi"), DAMAGED, "(its SHA-256 differs)")
    assert cli(*shlex.split(advice.partition(": hasten ")[2]), "--quiet").code == 0
    assert tree(Path("run/model")) == whole
    shutil.rmtree("run/checkpoints")
    truncate(Path("run/model/model.safetensors"))
    assert "--resume" not in cli("predict", "run", "hi").err  # nothing to write it from


# Damaged folders of pretrained models


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_bert(tmp_path_factory.mktemp("pretrained") / "bert")


def header_beyond_the_file(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def more_tokens(path: Path) -> None:
    words = (path.parent / "vocab.txt").read_text().split()
    write_tokenizer(path.parent, [*words, "more"])


def shard_outside(path: Path) -> None:
    outside = path.parent.absolute().parent / "outside.safetensors"
    (path.parent / "model.safetensors").rename(outside)
    path.write_text(json.dumps({"weight_map": {"embeddings.weight": str(outside)}}))


DAMAGED_BASES = {
    "weights cut": ("model.safetensors", truncate, DAMAGED, "not a whole safetensors file"),
    "header beyond the file": (
        "model.safetensors",
        header_beyond_the_file,
        DAMAGED,
        "not a whole safetensors file",
    ),
    "weights gone": ("model.safetensors", Path.unlink, DAMAGED, "there is no model.safetensors"),
    "shard outside": (
        "model.safetensors.index.json",
        shard_outside,
        DAMAGED,
        "names a file outside of the folder",
    ),
    "other shape": (
        "config.json",
        lambda path: rewrite(path, intermediate_size=56),
        DAMAGED,
        "config.json makes it",
    ),
    "config cut": ("config.json", truncate, DAMAGED, "config.json: not JSON"),
    "config gone": ("config.json", Path.unlink, USAGE, "it has no config.json"),
    "more tokens than rows": ("tokenizer.json", more_tokens, DAMAGED, "rows of the embedding"),
    "tokenizer cut": ("tokenizer.json", truncate, DAMAGED, "tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGED_BASES)
def test_a_damaged_pretrained_model(name: str, bert: Path, own_cache: Path, tmp_path: Path, cli):
    file, damage, code, said = DAMAGED_BASES[name]
    Path("train.csv").write_text(GOOD)
    shutil.copytree(bert, "bert")
    damage(Path("bert") / file)
    before = tree(tmp_path)
    for more in ([], ["-o", "run", "--quiet"]):
        ended = cli("train", "train.csv", "--model", "bert", "--epochs", "1", *more)
        assert_refused(ended, code, "bert", said)
        assert tree(tmp_path) == before
        assert_clean(own_cache)


def test_a_run_is_exported_or_nothing_is_written(trained: Path, tmp_path: Path, cli):
    run = trained / "run"
    before = tree(tmp_path)
    refused = cli("export", run, "--to", "huggingface", "-o", "out")
    assert refused.code == USAGE and "--to onnx" in refused.err and "Traceback" not in refused.err
    assert tree(tmp_path) == before
    more = ["--preset", "portable", *TINY, "--quiet", "-o", "portable"]
    assert cli("train", trained / "train.csv", *more).code == 0
    ended = cli("export", "portable", "--to", "huggingface", "-o", "out", "--json")
    assert ended.code == 0
    files = json.loads(ended.out)["files"]
    assert {"README.md", "config.json", "model.safetensors"} <= {*files}
    assert sorted(files) == sorted(path.name for path in Path("out").iterdir())
    assert_refused(cli("export", "portable", "--to", "onxx"), USAGE, "Did you mean 'onnx'?")


# A full or read-only disk, where no real one can be made; see test_cli_disk.py for real ones.


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EACCES"])
def test_the_disk_refuses(number: str, trained: Path, own_cache: Path, cli, tmp_path, monkeypatch):
    import errno

    code = getattr(errno, number)

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    train = ["train", str(trained / "train.csv"), *TINY]
    assert cli(*train, "--dry-run").code == 0  # the cache is filled
    before = tree(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse)
    advice = "free some space" if number == "ENOSPC" else "--output"
    ended = cli(*train, "-o", "run")
    assert_refused(ended, MACHINE, "creating the run folder", os.strerror(code), advice)
    assert tree(tmp_path) == before
    shutil.rmtree(own_cache)
    assert_refused(cli(*train), MACHINE, "HASTEN_CACHE", os.strerror(code))
    assert tree(tmp_path) == before
    assert_clean(own_cache)


def test_predictions_that_cannot_be_written(trained: Path, cli, tmp_path: Path, monkeypatch):
    import errno

    Path("out.csv").write_text("of old\n")
    before = tree(tmp_path)

    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    ended = cli("predict", trained / "run", "--input", trained / "train.csv", "-o", "out.csv")
    assert_refused(ended, MACHINE, "writing the labelled rows", "out.csv", "free some space")
    assert tree(tmp_path) == before


def test_errors_are_values_that_python_can_catch():
    kinds = {UsageError: 2, DataError: 3, DamagedError: 4, MachineError: 8}
    for kind, code in kinds.items():
        assert issubclass(kind, HastenError) and issubclass(kind, ValueError)
        assert kind("x").exit_code == code
