"""The command line as a person meets it: what is printed where, and what each verb writes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

import hasten
from builders import labelled_rows, write_rows
from hasten.cli.console import LiveConsole, PlainConsole, build_observer, count, duration, say
from hasten.cli.main import main, set_flags
from hasten.cli.settings import reading_from_flags
from hasten.cli.show import metrics_text, verdict_text
from hasten.config.load import build_config, known_keys
from hasten.core.errors import UsageError
from hasten.training.observe import EvaluationInfo, StepInfo

SMALL = [
    *("--model.num_layers", "1", "--model.hidden_size", "16", "--model.num_heads", "2"),
    *("--epochs", "1"),
]
TINY = [*SMALL, "--eval.baseline", "false"]


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Puts ``content`` into standard input."""
    stream = types.SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stream)


ROWS = labelled_rows(120)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and the run of each file, as ``hasten train`` leaves them."""
    folder = tmp_path_factory.mktemp("here")
    write_rows(folder / "basic.csv", ROWS, ("text", "label"))
    write_rows(folder / "test.csv", labelled_rows(30, seed=4), ("text", "label"))
    rows = [(text[:12], text, label) for text, label in ROWS]
    write_rows(folder / "two columns.csv", rows, ("title", "body", "category"))
    with (folder / "flags.jsonl").open("w") as file:
        for text, label in ROWS:
            file.write(json.dumps({"body": text, "spam": label == "bird", "n": 7}) + "\n")
    for name, more in (("basic", ["--test", folder / "test.csv"]), ("two columns", [])):
        argv = ["train", folder / f"{name}.csv", *TINY, *more, "-o", folder / name, "--quiet"]
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in argv])
        assert ended.value.code == 0
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that are the same every time they are measured."""
    return {k: v for k, v in metrics.items() if k not in ("seconds", "tokens_per_second")}


# Starting


def test_help_loads_nothing_heavy():
    """One child for all that answers without work, so that its modules are its own."""
    script = """
import contextlib, io, json, sys
from hasten.cli.main import main
codes = []
for arguments in (["--help"], ["-h"], [], ["--version"], ["--help-all"], ["train", "--help"],
                  ["train", "--help-all"], ["predict", "--help"], ["trian"], ["train", "--epoch"],
                  ["predict", "nowhere"], ["train", "a.csv", "--train.epoch", "3"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as end:
            codes.append(end.code)
print(json.dumps([codes, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes, modules = json.loads(done.stdout)
    assert codes == [0] * 8 + [2] * 4
    heavy = {"torch", "numpy", "transformers", "sklearn", "rich", "tokenizers", "safetensors"}
    assert "hasten" in modules and not heavy & set(modules)


def test_the_module_and_the_script_are_the_same_command():
    wanted = hasten.__version__ + "\n"
    for command in (
        [sys.executable, "-m", "hasten", "--version"],
        [str(Path(sys.executable).with_name("hasten")), "--version"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, wanted, "")


def test_help_names_every_verb_and_the_flags_that_matter(cli):
    shown = cli("--help")
    assert shown.code == 0 and shown.err == ""
    assert cli().out == shown.out
    for verb in ("demo", "inspect", "train", "evaluate", "predict"):
        assert f"\n  {verb} " in shown.out
        one = cli(verb, "--help")
        assert one.code == 0 and one.out.startswith(f"Usage: hasten {verb}")
    assert "..." not in shown.out.partition("Commands:")[2]  # nothing is cut off
    train = cli("train", "--help").out
    for flag in (
        *("--task", "--tokenizer", "--validation", "--test", "--text-column", "--label-column"),
        *(
            "--model",
            "--preset",
            "--config",
            "--output",
            "--seed",
            "--epochs",
            "--device",
            "--max-restarts",
            "--resume",
        ),
        *("--dry-run", "--json", "--quiet", "--help-all"),
    ):
        assert f"{flag} " in train or f"{flag}\n" in train, flag
    assert "--debug" in shown.out
    assert "--train." not in train.replace("--train.learning_rate", "")


def test_help_says_in_words_what_to_give(cli):
    """Not in types of Python's, which typer would write: <list[str]>, {run}."""
    for verb in ("demo", "inspect", "train", "evaluate", "predict"):
        usage, _, shown = cli(verb, "--help").out.partition("\n")
        assert re.fullmatch(
            rf"Usage: hasten {verb} \[OPTIONS\]( [A-Z]+| \[[A-Z]+\](\.\.\.)?)*", usage
        )
        assert not re.search(r"[{}]|<(str|int|float|bool|list|path)", shown)
        options = re.findall(r"^  (?:-\w, )?--([a-z-]+)(.*?)(?:  |\n)", shown, re.M)
        takes_none = {"dry-run", "json", "quiet", "help-all", "help"}
        for name, value in options:
            assert re.fullmatch("" if name in takes_none else " [A-Z]+", value), (verb, name)
        assert len(options) >= 4
    assert "--text-column COLUMN  " in cli("inspect", "--help").out


def test_help_all_lists_every_key_with_its_default_and_choices(cli):
    shown = cli("--help-all")
    assert shown.code == 0 and cli("train", "--help-all").out == shown.out
    lines = {line.split()[0]: line for line in shown.out.splitlines() if line.startswith("  --")}
    assert set(lines) == {f"--{key}" for key in known_keys()}
    assert "[5.0]" in lines["--train.checkpoint_minutes"]
    assert "[auto]" in lines["--optim.optimizer"] and "adafactor" in lines["--optim.optimizer"]
    assert "[false]" in lines["--model.bias"] and "None" not in shown.out
    assert all(len(line.split()) > 2 for line in lines.values())  # none without a description


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--train.epochs", "3"], ["--set", "train.epochs=3"]),
        (["--train.epochs=3"], ["--set", "train.epochs=3"]),
        (["--data.delimiter", "="], ["--set", "data.delimiter=="]),
        (["--data.train=a=b\nc"], ["--set", "data.train=a=b\nc"]),
        (["--data.delimiter", "--"], ["--set", "data.delimiter=--"]),
        (["x", "--", "--train.epochs", "3"], ["x", "--", "--train.epochs", "3"]),
        (["a.b", "-x.y", "--test", "t.csv"], ["a.b", "-x.y", "--test", "t.csv"]),
    ],
)
def test_any_key_is_a_flag(given: list[str], read: list[str]):
    assert set_flags(given) == read


def test_a_key_without_a_value():
    with pytest.raises(UsageError, match=r"--train\.epochs needs a value"):
        set_flags(["a.csv", "--train.epochs"])


# train


def test_every_guess_is_printed_with_its_reason(here: Path, cli):
    ended = cli("train", here / "basic.csv", *TINY, "--test", here / "test.csv")
    assert ended.code == 0
    notes = ended.err.splitlines()
    for begin, reason in (
        ("delimiter ','", "the same 2 columns"),
        ("the first row is a header", "names such as 'text' and 'label'"),
        ("text column 'text'", "named so"),
        ("label column 'label'", "3 values in the first 120 rows"),
        ("validation: 12 rows of ", "held out by a hash"),
        ("tokenizer: bpe trained on the training rows", "characters of text"),
        ("train.device ", "CUDA"),
        ("train.num_threads 1 (", "OMP_NUM_THREADS"),
    ):
        assert any(n.startswith(begin) and reason in n for n in notes), begin
    assert f"{here}/basic.csv: 120 rows read, 120 used" in notes
    assert f"{here}/test.csv: 30 rows read, 30 used" in notes
    assert "run folder: runs/basic-1" in notes
    assert any(n.startswith("validation after epoch 1.0 (step ") for n in notes)
    plan = json.loads(Path("runs/basic-1/plan.json").read_text())
    said_otherwise = ("task", "data.segments", "tokenizer.vocab_size")
    for choice in plan:
        key, reason = choice["key"], choice["reason"]
        told = any(f"{key} " in note and note.endswith(f"({reason})") for note in notes)
        assert told or key in said_otherwise, key
    config = yaml.safe_load(Path("runs/basic-1/config.yaml").read_text())
    assert "auto" not in json.dumps(config)


def test_the_verdict_says_what_the_files_say(here: Path, cli):
    ended = cli("train", here / "basic.csv", *SMALL, "--test", here / "test.csv")
    found = json.loads(Path("runs/basic-1/result.json").read_text())
    lines = ended.out.splitlines()
    low, high = found["test"]["accuracy_interval"]
    assert (
        f"test: accuracy {found['test']['accuracy']:.4f} (95% interval {low:.4f} to {high:.4f})  "
        f"macro F1 {found['test']['macro_f1']:.4f}  loss {found['test']['loss']:.4f}  30 examples"
    ) in lines
    assert "compared by accuracy on test, trained on the same rows:" in lines
    # The truth, counted by hand from the labels that the run predicts.
    rows = list(csv.DictReader((here / "test.csv").open(newline="")))
    run = hasten.load("runs/basic-1")
    right = [
        p["label"] == r["label"]
        for p, r in zip(run.predict([r["text"] for r in rows]), rows, strict=True)
    ]
    assert found["test"]["accuracy"] == sum(right) / 30
    assert low < sum(right) / 30 < high
    assert found["baselines"]["majority"]["accuracy"] == 10 / 30
    per_class = {row["label"]: row for row in found["test"]["per_class"]}
    for name in ("bird", "fruit", "tool"):
        assert per_class[name]["num_examples"] == 10
        hits = sum(ok for ok, row in zip(right, rows, strict=True) if row["label"] == name)
        assert per_class[name]["recall"] == hits / 10
    assert lines[-2] == "run folder: runs/basic-1"
    assert lines[-1] == 'try it: hasten predict runs/basic-1 "some text"'


def test_run_folders_are_numbered(here: Path, cli):
    for wanted in ("runs/basic-1", "runs/basic-2"):
        ended = cli("train", here / "basic.csv", *TINY, "--json")
        assert json.loads(ended.out)["run"] == wanted
    assert sorted(path.name for path in Path("runs").iterdir()) == ["basic-1", "basic-2"]


def test_json_is_one_object_and_nothing_else(here: Path, cli):
    wanted = json.loads((here / "basic" / "result.json").read_text())
    for arguments, keys in (
        (["train", here / "basic.csv", "--test", here / "test.csv", *TINY], set(wanted)),
        (["evaluate", here / "basic", here / "test.csv"], {"accuracy", "loss", "num_read"}),
        (["predict", here / "basic", "an apple", "a saw"], {"predictions"}),
        (
            ["predict", here / "basic", "--input", here / "test.csv", "-o", "o.csv"],
            {"output", "num_labelled"},
        ),
        (["inspect", here / "basic.csv"], {"columns", "classes", "num_rows"}),
        (["train", here / "basic.csv", *TINY, "--dry-run"], {"config", "choices", "steps"}),
    ):
        ended = cli(*arguments, "--json")
        assert ended.code == 0
        assert ended.out.count("\n") == 1
        found = json.loads(ended.out, parse_constant=pytest.fail)
        assert keys <= set(found), arguments
        if arguments[0] != "predict" and "--dry-run" not in arguments:
            assert ended.err == ""
    assert {"run", "validation", "test"} <= set(wanted)
    again = json.loads(cli("evaluate", here / "basic", here / "test.csv", "--json").out)
    assert timeless(again).items() >= timeless(wanted["test"]).items()


def test_json_has_no_numbers_that_json_does_not_know(here: Path, cli):
    """A test file without any label of the training has no loss; `NaN` is not JSON."""
    write_rows(Path("other.csv"), [("a big fish", "fish")] * 3, ("text", "label"))
    ended = cli("train", here / "basic.csv", "--test", "other.csv", *TINY, "--json", "-o", "run")
    assert ended.code == 0 and "labels never seen in training count as errors: fish" in ended.err
    for text in (ended.out, Path("run/result.json").read_text()):
        test = json.loads(text, parse_constant=pytest.fail)["test"]
        assert test["loss"] is None and test["accuracy"] == 0 and test["num_examples"] == 3


def test_dry_run_writes_no_run_folder_and_shows_what_would_run(here: Path, cli, tmp_path: Path):
    ended = cli("train", here / "basic.csv", *TINY, "--dry-run", "--preset", "tiny")
    assert ended.code == 0 and tree(tmp_path) == set()
    config = yaml.safe_load(ended.out)
    assert config["train"]["epochs"] == 1 and config["model"]["hidden_size"] == 16
    assert config["model"]["norm"] == "rmsnorm" and "auto" not in json.dumps(config)
    # What it prints is a file that trains the same.
    Path("plan.yaml").write_text(ended.out)
    real = cli("train", "-c", "plan.yaml", "--json", "--quiet")
    steps = json.loads(real.out)["training"]["steps"]
    assert ended.out.splitlines()[-1].startswith(f"# {steps} step")
    # What would stop the run stops the rehearsal.
    for more, code in (
        (["--model.hidden_size", "15"], 2),
        (["-o", here / "basic"], 2),
        (["--test", "none.csv"], 3),
    ):
        assert cli("train", here / "basic.csv", *TINY, *more, "--dry-run").code == code


def test_quiet_keeps_warnings_and_results(here: Path, cli):
    write_rows(Path("rare.csv"), [*ROWS, ("an owl", "rare")], ("text", "label"))
    ended = cli("train", "rare.csv", *TINY, "--quiet")
    (warning,) = ended.err.splitlines()
    assert warning.startswith("warning: rare.csv: ") and warning.endswith("rare")
    assert ended.out.startswith("validation: accuracy ")


def test_nothing_left_to_measure_on_is_said(cli):
    write_rows(Path("few.csv"), [("good one", "a"), ("bad one", "b")], ("text", "label"))
    ended = cli("train", "few.csv", *TINY, "--quiet", "--eval.patience", "0")
    assert ended.code == 0
    assert "no rows were left to measure the model on: give --validation or --test" in ended.out
    assert "step 0" not in ended.out and "1 step)" in ended.out


@pytest.mark.parametrize("more", [[], ["--data.validation_fraction", "0"]])
def test_defaults_train_where_nothing_is_held_out(more: list[str], here: Path, cli):
    write_rows(Path("few.csv"), [("good one", "a"), ("bad one", "b")], ("text", "label"))
    data = here / "basic.csv" if more else "few.csv"
    assert cli("train", data, *TINY, *more).code == 0


def test_the_advice_for_two_text_columns_works(here: Path, cli):
    shown = verdict_text(json.loads((here / "two columns" / "result.json").read_text()))
    line = shown.splitlines()[-1]
    assert line == f'try it: hasten predict \'{here}/two columns\' "some title" "some body"'
    import shlex

    assert cli(*shlex.split(line.removeprefix("try it: hasten "))).code == 0


def test_standard_input_trains_and_is_kept_with_the_run(
    here: Path, cli, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    pipe(monkeypatch, (here / "basic.csv").read_bytes())
    ended = cli("train", "-", *TINY, "--json")
    assert ended.code == 0
    run = Path(json.loads(ended.out)["run"])
    kept = run / "standard-input.csv"
    assert kept.read_bytes() == (here / "basic.csv").read_bytes()
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train"] == [
        str(kept.absolute())
    ]
    assert not list(own_cache.glob("stdin*"))
    assert cli("train", "--resume", run, "--quiet").code == 0  # it needs no standard input


def test_two_readers_of_standard_input_do_not_meet(here: Path, own_cache: Path, monkeypatch):
    from hasten.training.session import standard_input_as_file

    pipe(monkeypatch, b"text,label\none,a\n")
    with standard_input_as_file() as first:
        pipe(monkeypatch, b"text,label\ntwo,b\n")
        with standard_input_as_file() as second:
            assert first.read_bytes() != second.read_bytes()
    assert list(own_cache.iterdir()) == []


# the forms of data


def write_form(form: str) -> Path:
    """The same rows, written in one of the ways that people write them."""
    header = ["id", " Comment ", "kind"]
    rows = [(str(i), text, label) for i, (text, label) in enumerate(ROWS)]
    path = Path(f"data{form if form.startswith('.') else '.csv'}")
    if form == "semicolon and BOM":
        lines = [";".join(header), *(f'{i};"{text}";{label}' for i, text, label in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    elif form == "quoted newlines":
        rows = [(i, text.replace(" ", "\n", 1) + ', "so"', label) for i, text, label in rows]
        write_rows(path, rows, header)
    elif form == "no header":
        write_rows(path, rows[1:], rows[0])
    elif form.startswith(".jsonl"):
        lines = [json.dumps({"Comment": t, "kind": k}) + "\n" for _, t, k in rows]
        with (gzip.open if form.endswith("gz") else open)(path, "wt") as file:
            file.writelines(lines)
    else:
        delimiter = "\t" if ".tsv" in form else ","
        with (gzip.open if form.endswith("gz") else open)(path, "wt", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


@pytest.mark.parametrize(
    "form",
    [".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", "semicolon and BOM",
     "quoted newlines", "no header"],
)  # fmt: skip
def test_every_form_is_read_alike(form: str, cli):
    path = write_form(form)
    looked = json.loads(cli("inspect", path, "--json").out)
    assert looked["num_rows"] == looked["num_used"] == 120
    assert looked["classes"] == {"bird": 40, "fruit": 40, "tool": 40}
    names = ["2", "3"] if form == "no header" else ["Comment", "kind"]
    assert [*looked["text_columns"], looked["label_column"]] == names
    more = ["--text-column", "2", "--label-column", "3"] if form == "no header" else []
    ended = cli("train", path, *TINY, *more, "--json")
    assert ended.code == 0, ended.err
    data = json.loads(Path(json.loads(ended.out)["run"], "data.json").read_text())
    assert data["columns"] == names[:1] and data["label_column"] == names[1]
    assert data["id2label"] == {"0": "bird", "1": "fruit", "2": "tool"}
    assert data["rows"]["train"] == {"read": 120, "used": 120, "rejected": 0}


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ({"fruit": 0, "tool": 2, "bird": 10}, ["0", "2", "10"]),
        ({"fruit": True, "tool": False, "bird": False}, ["false", "true"]),
        ({"fruit": "体育", "tool": "财经", "bird": "null"}, ["null", "体育", "财经"]),
    ],
)
def test_labels_keep_their_names_to_the_end(values: dict[str, Any], labels: list[str], cli):
    with Path("data.jsonl").open("w") as file:
        for text, label in ROWS:
            file.write(json.dumps({"text": text, "label": values[label]}) + "\n")
    ended = cli("train", "data.jsonl", *TINY)
    assert ended.code == 0
    run = hasten.load("runs/data-1")
    assert list(run.task.labels) == labels
    table = ended.out.splitlines()[2 : 2 + len(labels)]
    assert [line.split()[0] for line in table] == labels
    # Chinese takes two columns a character on a terminal.
    assert len({_width(line) for line in table}) == 1
    shown = cli("predict", "runs/data-1", "an apple").out.split("\t")
    assert shown[0] in labels and shown[2] == "an apple\n"
    assert set(run.predict("an apple")[0]["probabilities"]) == set(labels)


def _width(line: str) -> int:
    return sum(1 + ("一" <= c <= "鿿") for c in line)


def test_chinese_text(cli):
    kinds = (("足球比赛", "体育"), ("股票市场", "财经"))
    rows = [(f"今天{'的' * i}{what}新闻。", label) for i in range(40) for what, label in kinds]
    write_rows(Path("新闻.csv"), rows, ("文本", "类别"))
    ended = cli("train", "新闻.csv", *TINY)
    assert ended.code == 0 and "text column '文本'" in ended.err
    assert cli("predict", "runs/新闻-1", "足球").out.split("\t")[0] in ("体育", "财经")


# predict


def test_predict_prints_one_line_a_text(here: Path, cli):
    ended = cli(
        "predict", here / "basic", "a red apple", "two\nlines and\ta tab", "", "  a red apple "
    )
    assert ended.code == 0 and ended.err == ""
    lines = [line.split("\t") for line in ended.out.splitlines()]
    assert [line[2] for line in lines] == ["a red apple", "two lines and a tab", "", "a red apple"]
    assert lines[0][:2] == lines[3][:2]  # white space around a text means nothing
    found = json.loads(cli("predict", here / "basic", "a red apple", "--json").out)["predictions"]
    (first,) = found
    assert first["label"] == lines[0][0] and f"{first['probability']:.4f}" == lines[0][1]
    assert sum(first["probabilities"].values()) == pytest.approx(1)
    assert max(first["probabilities"].values()) == first["probability"]
    assert (
        cli("predict", here / "two columns", "a", "b", "c", "d")
        .out.splitlines()[1]
        .endswith("c | d")
    )


def test_what_follows_two_dashes_is_text(here: Path, cli):
    ended = cli("predict", here / "basic", "--", "--debug", "--train.epochs", "-5 degrees")
    assert [line.split("\t")[2] for line in ended.out.splitlines()] == [
        "--debug", "--train.epochs", "-5 degrees",
    ]  # fmt: skip


def read_back(path: Path) -> list[dict[str, Any]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="") as file:
        if ".jsonl" in path.name:
            return [json.loads(line) for line in file]
        return list(csv.DictReader(file, delimiter="\t" if ".tsv" in path.name else ","))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz"])
@pytest.mark.parametrize("source", ["two columns.csv", "flags.jsonl"])
def test_labelling_a_file_keeps_its_columns(source: str, suffix: str, here: Path, cli):
    run = here / ("two columns" if source.startswith("two") else "basic")
    more = [] if source.startswith("two") else ["--text-column", "body"]
    ended = cli("predict", run, "--input", here / source, "-o", f"out{suffix}", *more)
    assert (ended.code, ended.out) == (0, "")
    assert ended.err == f"out{suffix}: 120 rows labelled\n"
    rows, given = read_back(Path(f"out{suffix}")), read_back(here / source)
    assert list(rows[0]) == [*given[0], "label", "probability"]
    texts = [(r["title"], r["body"]) if "title" in r else r["body"] for r in given]
    for row, was, prediction in zip(rows, given, hasten.load(run).predict(texts), strict=True):
        assert row["label"] == prediction["label"]
        assert float(row["probability"]) == pytest.approx(prediction["probability"], abs=1e-6)
        for name, value in was.items():
            as_text = (
                {True: "true", False: "false"}.get(value, str(value))
                if name == "spam"
                else str(value)
            )
            assert row[name] == (value if ".jsonl" in suffix and ".jsonl" in source else as_text)
    assert tree(Path()) == {f"out{suffix}"}


def test_labelling_rows_that_cannot_be_labelled(here: Path, cli):
    Path("in.csv").write_text('text,label\n"an\napple",x\n,y\na saw,z,too many\nan owl,w\n')
    ended = cli("predict", here / "basic", "--input", "in.csv", "-o", "out.csv")
    assert ended.code == 0
    assert ended.err.splitlines() == [
        "warning: in.csv, line 4: the text is empty; no label",
        "warning: in.csv, line 5: 3 cells where the header has 2; left out",
        "out.csv: 2 rows labelled, 1 without text kept as they were, 1 unreadable left out",
    ]
    rows = read_back(Path("out.csv"))
    assert [row["text"] for row in rows] == ["an\napple", "", "an owl"]
    assert rows[1]["predicted_label"] == rows[1]["probability"] == ""
    assert rows[0]["label"] == "x" and rows[0]["predicted_label"] in ("bird", "fruit", "tool")


def test_no_column_is_overwritten_by_an_added_one(here: Path, cli):
    write_rows(Path("in.csv"), [("an owl", "x", "y", "z")],
               ("text", "label", "predicted_label", "probability"))  # fmt: skip
    assert cli("predict", here / "basic", "--input", "in.csv", "-o", "out.jsonl").code == 0
    (row,) = read_back(Path("out.jsonl"))
    assert list(row) == [
        "text", "label", "predicted_label", "probability",
        "predicted_predicted_label", "predicted_probability",
    ]  # fmt: skip
    assert (row["label"], row["predicted_label"], row["probability"]) == ("x", "y", "z")


def test_a_headerless_file_stays_so(cli):
    write_rows(Path("in.csv"), ROWS[1:], ROWS[0])
    assert cli("train", "in.csv", *TINY, "-o", "run").code == 0
    assert cli("predict", "run", "--input", "in.csv", "-o", "out.csv").code == 0
    rows = list(csv.reader(Path("out.csv").read_text().splitlines()))
    assert [tuple(row[:2]) for row in rows] == ROWS
    assert cli("evaluate", "run", "in.csv").out.startswith("in.csv: accuracy ")


def test_the_reading_verbs_take_standard_input(here: Path, cli, own_cache: Path, monkeypatch):
    content = (here / "test.csv").read_bytes()
    for arguments in (
        ["inspect", "-"],
        ["evaluate", here / "basic", "-"],
        ["predict", here / "basic", "--input", "-", "-o", "out.csv"],
    ):
        pipe(monkeypatch, content)
        ended = cli(*arguments)
        assert ended.code == 0, ended.err
        assert str(own_cache) not in ended.out + ended.err
        assert ended.out.startswith("standard input: ") or arguments[0] == "predict"
        assert not list(own_cache.glob("stdin*"))
    assert len(read_back(Path("out.csv"))) == 30


def test_the_reading_verbs_take_the_encoding_and_the_delimiter(here: Path, cli):
    Path("in.csv").write_bytes("text|label\ncafé owl|bird\na pear|fruit\n".encode("latin-1"))
    how = ["--data.encoding", "latin-1", "--data.delimiter", "|"]
    assert cli("inspect", "in.csv").code == 3
    looked = cli("inspect", "in.csv", *how)
    assert 'text="café owl"' in looked.out
    plain = cli("inspect", "in.csv", "--encoding", "latin-1", "--delimiter", "|").out
    timeless = [line for line in looked.out.splitlines() if "rows/s" not in line]
    assert [line for line in plain.splitlines() if "rows/s" not in line] == timeless
    assert looked.out.splitlines()[-1] == (
        "next: hasten train in.csv --data.delimiter '|' --data.encoding latin-1"
    )
    assert (
        json.loads(cli("evaluate", here / "basic", "in.csv", *how, "--json").out)["num_read"] == 2
    )
    assert cli("predict", here / "basic", "--input", "in.csv", "-o", "o.jsonl", *how).code == 0
    assert read_back(Path("o.jsonl"))[0]["text"] == "café owl"


def test_only_keys_about_reading_reach_the_reading_verbs():
    reading = reading_from_flags(["data.header=false"], encoding="latin-1", delimiter=None)
    assert (reading.header, reading.encoding, reading.delimiter) == (False, "latin-1", None)
    with pytest.raises(UsageError, match=r"--data\.test is for training"):
        reading_from_flags(["data.test=x.csv"])
    with pytest.raises(UsageError, match=r"no such key: --data\.encodin\. Did you mean"):
        reading_from_flags(["data.encodin=x"])


# evaluate, inspect


def test_evaluate_says_what_the_run_said_of_its_test_file(here: Path, cli):
    shown = cli("evaluate", here / "basic", here / "test.csv").out
    wanted = metrics_text(str(here / "test.csv"), hasten.load(here / "basic").result["test"])
    assert shown == wanted + "\n"


def test_evaluate_counts_unseen_labels_as_errors_and_names_them(here: Path, cli):
    rows = [(text, label) for text, label in ROWS[:9]] + [("a big fish", "fish")]
    write_rows(Path("in.csv"), rows, ("text", "label"))
    ended = cli("evaluate", here / "basic", "in.csv", "--json")
    assert ended.err == (
        "warning: in.csv: labels never seen in training count as errors: fish (1 of 10 rows)\n"
    )
    found = json.loads(ended.out)
    known = hasten.load(here / "basic").predict([text for text, _ in ROWS[:9]])
    hits = sum(p["label"] == label for p, (_, label) in zip(known, ROWS[:9], strict=True))
    assert found["accuracy"] == pytest.approx(hits / 10) and found["num_examples"] == 10


def test_inspect_names_what_stands_in_the_way(cli):
    write_rows(
        Path("one.csv"), [(f"text number {i}", "same") for i in range(30)], ("text", "label")
    )
    ended = cli("inspect", "one.csv")
    assert ended.code == 0
    assert any(line.startswith("problem: one.csv: every row") for line in ended.out.splitlines())
    assert "next:" not in ended.out


def test_inspect_counts_every_row(cli):
    lines = [f"text {i},{'ab'[i % 2]}" for i in range(40)]
    Path("in file.csv").write_text(
        "\n".join(["text,label", *lines, "x,a,b", ",a", lines[0]]) + "\n"
    )
    shown = cli("inspect", "in file.csv", "--label-column", "label").out.splitlines()
    assert "rows: 43 read, 41 usable, 2 rejected" in shown
    assert any("1 x 3 cells where the header has 2 (first in line 42)" in line for line in shown)
    assert any("duplicates: 1 row" in line for line in shown)
    assert shown[-1] == "next: hasten train 'in file.csv' --label-column label"


# Python


def test_python_says_the_same(here: Path, cli):
    from_shell = json.loads(
        cli("train", here / "basic.csv", "--test", here / "test.csv", *TINY, "--json").out
    )
    settings = {
        "model.num_layers": 1, "model.hidden_size": 16, "model.num_heads": 2,
        "train.epochs": 1, "eval.baseline": False,
    }  # fmt: skip
    run = hasten.train(here / "basic.csv", test=here / "test.csv", settings=settings)
    assert run.folder == Path("runs/basic-2") and "runs/basic-2" in repr(run)
    assert timeless(run.result["test"]) == timeless(from_shell["test"])
    model = Path("model/model.safetensors")
    assert (run.folder / model).read_bytes() == (Path("runs/basic-1") / model).read_bytes()
    again = hasten.load("runs/basic-2")
    assert again.predict(["a", "b"]) == run.predict(["a", "b"])
    assert again.predict("a")[0]["label"] in run.task.labels
    assert again.predict([]) == []
    assert again.evaluate(here / "test.csv")["accuracy"] == from_shell["test"]["accuracy"]
    pair = hasten.load(here / "two columns")
    assert pair.predict([("a title", "a body")])[0]["label"] in pair.task.labels
    with pytest.raises(UsageError, match=r"takes 2 texts for each prediction \(title, body\)"):
        pair.predict(["only one"])


def test_the_public_names_are_all_there_and_loaded_late():
    for name in hasten.__all__:
        assert getattr(hasten, name).__name__ == name
    assert set(dir(hasten)) >= {*hasten.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = hasten.trian


# What is said while a run works


def info(step: int, total: int = 10, **changes: Any) -> StepInfo:
    values: dict[str, Any] = {
        "step": step, "total_steps": total, "epoch": 0.5, "loss": 1.25, "accuracy": 0.5,
        "learning_rate": 1e-3, "gradient_norm": 1.0, "num_tokens": 100,
        "tokens_per_second": 12345.6, "seconds_left": 75.0, "num_skipped": 0,
    }  # fmt: skip
    return StepInfo(**{**values, **changes})


def test_plain_lines_come_every_few_seconds_and_at_the_end(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("hasten.cli.console.time.monotonic", lambda: now[0])
    console = PlainConsole()
    for step in range(1, 11):
        now[0] += 1
        console.step(info(step, num_skipped=3 * (step == 10)))
    err = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in err] == ["1/10", "6/10", "10/10"]
    assert err[0] == (
        "step 1/10  epoch 0.5  loss 1.2500  accuracy 0.500  12,346 tokens/s  1 min 15 s left"
    )
    assert err[2].endswith("skipped 3")


def test_quiet_says_warnings_only(capsys):
    quiet = build_observer(quiet=True)
    quiet.note("a note")
    quiet.step(info(10))
    quiet.evaluation(EvaluationInfo(1, 1.0, "validation", {"loss": 1.0}, True))
    quiet.warn("look here")
    assert capsys.readouterr() == ("", "warning: look here\n")


def test_on_a_terminal_one_line_updates_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    live = build_observer(quiet=False)
    assert isinstance(live, LiveConsole)
    live.note("columns [text] and [label]")  # rich would take brackets for markup
    for step in (1, 10):
        live.step(info(step))
    live.evaluation(EvaluationInfo(10, 1.0, "validation", {"loss": 1.0, "accuracy": 0.5}, True))
    live.warn("[odd]")
    live.close()
    out, err = capsys.readouterr()
    assert out == "" and "columns [text] and [label]" in err and "[odd]" in err
    assert "validation after epoch 1.0 (step 10): loss 1.0000  accuracy 0.5000  best so far" in err


def test_a_reader_of_messages_that_has_gone_stops_nothing(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    say("into the void")
    say("again")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.01, "under 0.1 s"), (0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"),
     (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (7859, "2 h 10 min")],
)  # fmt: skip
def test_durations_are_for_people(seconds: float, text: str):
    assert duration(seconds) == text


def test_one_is_no_plural():
    assert [count(n, "step") for n in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]


def test_the_yaml_of_a_run_is_its_configuration(here: Path):
    file = here / "basic" / "config.yaml"
    assert yaml.safe_load(file.read_text()) == build_config(file=file).model_dump(mode="json")
