"""What goes wrong, or might, with texts to translate and to continue: through the command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hasten
from builders import labelled_rows, write_rows
from conftest import Ended
from hasten.cli.main import main
from hasten.core.errors import UsageError

SMALL = [
    *("--model.num_layers", "1", "--model.hidden_size", "16", "--model.num_heads", "2"),
    *("--epochs", "1", "--eval.baseline", "false"),
]
USAGE, DATA = 2, 3
Cli = Callable[..., Ended]

WORDS = ["heron", "Säge", "plum €", "two owls", "中文字", "a drill", "Melone", "👍🏽 yes"]
PAIRS = [(f"{word} {i}", f"{word[::-1]} {i}") for i in range(4) for word in WORDS]


def write_aligned(name: str, pairs: list[tuple[str, str]]) -> list[str]:
    """Writes NAME.src and NAME.tgt; returns the flags that name them."""
    for suffix, lines in zip(("src", "tgt"), zip(*pairs, strict=True), strict=True):
        text = "".join(f"{line}\n" for line in lines)
        Path(f"{name}.{suffix}").write_text(text, encoding="utf-8")
    return ["--source", f"{name}.src", "--target", f"{name}.tgt"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with finished runs: labels, translator, pairs, text (char) and bytes."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rows(Path("labels.csv"), labelled_rows(60), ("text", "label"))
        write_rows(Path("pairs.csv"), PAIRS, ("prompt", "response"))
        text = "".join(f"{prompt}, {response}\n" for prompt, response in PAIRS)
        Path("text.txt").write_text(text * 10, encoding="utf-8")
        files = {
            "labels": ["labels.csv"],
            "translator": write_aligned("x", PAIRS),
            "pairs": ["pairs.csv", "--tokenizer", "byte", "--tokenizer.max_length", "64"],
            "text": ["text.txt", "--tokenizer", "char", "--tokenizer.max_length", "32"],
            "bytes": ["text.txt", "--tokenizer", "byte", "--tokenizer.max_length", "32"],
        }
        for name, flags in files.items():
            with pytest.raises(SystemExit) as ended:
                main(["train", *flags, *SMALL, "-o", name, "--quiet"])
            assert ended.value.code == 0, name
    yield folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_refused(ended: Ended, code: int, *parts: str) -> None:
    """One line on standard error, at the end of it, and nothing on standard output."""
    assert ended.code == code, ended.err
    assert ended.out == "" and "Traceback" not in ended.err
    assert ended.last.startswith("hasten: ") and len(ended.last) < 300
    assert ended.last.endswith((".", "?"))
    for part in parts:
        assert part in ended.last, (part, ended.last)


# Pairs of texts


def test_files_of_unequal_length(cli: Cli):
    flags = write_aligned("x", PAIRS)
    Path("x.tgt").write_text("eins\nzwei\n", encoding="utf-8")
    for more in ([], ["--dry-run"]):
        ended = cli("train", *flags, *SMALL, *more)
        assert_refused(ended, DATA, "x.src has 32 lines", "x.tgt 2 lines", "same number")
    assert not Path("runs").exists()


def test_an_empty_line_is_rejected_with_its_number(cli: Cli):
    pairs = list(PAIRS)
    pairs[4], pairs[8] = ("a source", ""), (" ", "a target")
    ended = cli("train", *write_aligned("x", pairs), *SMALL, "-o", "run", "--json")
    assert ended.code == 0, ended.err
    rejected = [json.loads(line) for line in Path("run/rejected.jsonl").read_text().splitlines()]
    assert [(one["line"], one["reason"]) for one in rejected] == [
        (5, "the target is empty"),
        (9, "the source is empty"),
    ]
    assert json.loads(ended.out)["training"]["num_rejected"] == 2
    assert "32 rows read, 30 used, 2 rejected" in ended.err
    assert "line 5: the target is empty" in ended.err
    strict = cli("train", *write_aligned("x", pairs), *SMALL, "--data.max_rejected_fraction", "0")
    assert_refused(strict, DATA, "2 of 32 rows", "line 5: the target is empty")


def test_a_target_that_is_too_long_is_cut_and_counted(cli: Cli):
    pairs = [*PAIRS, ("short", "long " * 40)]
    flags = [*write_aligned("x", pairs), "--tokenizer", "char", "--tokenizer.max_length", "30"]
    ended = cli("train", *flags, *SMALL, "--data.validation_fraction", "0", "-o", "run", "--json")
    assert ended.code == 0, ended.err
    assert "warning: x.src + x.tgt: 1 " in ended.err
    assert "longer than 30 tokens" in ended.err and "--tokenizer.max_length" in ended.err
    assert json.loads(ended.out)["training"]["num_truncated"] == 1


def test_half_a_pair_of_files(trained: Path, cli: Cli):
    flags = write_aligned("x", PAIRS)
    together = "--source and --target go together"
    for half in (flags[:2], flags[2:]):
        assert_refused(cli("train", *half, *SMALL), USAGE, together)
    for split in ("validation", "test"):
        ended = cli("train", *flags, f"--{split}-source", "x.src", *SMALL)
        assert_refused(ended, USAGE, f"--{split}-source and --{split}-target go together")
        both = cli("train", *flags, f"--{split}", "x.src", f"--{split}-source", "x.src", *SMALL)
        assert_refused(both, USAGE, f"--{split} or --{split}-source", "not both")
    ended = cli("train", trained / "pairs.csv", "--source", "promt", *SMALL)
    assert_refused(ended, USAGE, "no column 'promt'", "Did you mean 'prompt'?")
    assert not Path("runs").exists()


# command line -> exit code, and what is said of it
WRONG_USE: dict[str, tuple[int, tuple[str, ...]]] = {
    # settings of another task, and what is not measured
    "train PAIRS --task translation --train.class_weights balanced": (
        USAGE,
        ("train.class_weights has no effect on translation",),
    ),
    "train PAIRS --task translation --train.loss focal": (
        USAGE,
        ("train.loss has no effect on translation",),
    ),
    "train PAIRS --model.pooling mean": (
        USAGE,
        ("model.pooling has no effect on text-generation",),
    ),
    "train PAIRS --data.stride 7": (USAGE, ("data.stride has no effect on text-generation",)),
    "train PAIRS --task translation --eval.metric blue": (
        USAGE,
        ("'blue' is not measured in translation", "Did you mean 'bleu'?"),
    ),
    "train PAIRS --eval.metric bits_per_bite": (USAGE, ("Did you mean 'bits_per_byte'?",)),
    "train PAIRS --eval.metric accuracy": (
        USAGE,
        ("'accuracy' is not measured in text-generation", "loss, perplexity, bits_per_byte"),
    ),
    "train LABELS --eval.metric bleu": (USAGE, ("not measured in text-classification",)),
    "train TEXT --eval.patience 3": (USAGE, ("eval.patience needs validation rows",)),
    "train PAIRS --task text-translation": (USAGE, ("Did you mean 'translation'?",)),
    "train PAIRS --task translation --text-column prompt": (USAGE, ("--source and --target",)),
    # decoding options that contradict each other
    "predict text hi --top-k 3": (USAGE, ("--top-k", "--temperature 1")),
    "predict text hi --top-p 0.5": (USAGE, ("--top-p", "--temperature 1")),
    "predict text hi --num-beams 2 --temperature 1": (USAGE, ("--num-beams", "--temperature")),
    "predict text hi --n-best 3": (USAGE, ("--n-best 3", "--num-beams 3", "--temperature 1")),
    "predict text hi --num-beams 2 --n-best 3": (USAGE, ("--n-best 3", "--num-beams 3", "got 2")),
    "predict translator hi --n-best 9": (USAGE, ("--n-best 9", "--num-beams 9", "got 4")),
    "predict translator hi --temperature 1 --num-beams 4": (USAGE, ("--num-beams",)),
    "predict translator hi --top-k 3": (USAGE, ("--top-k", "--temperature 1")),
    "predict text hi --length-penalty 2": (USAGE, ("--length-penalty", "--num-beams 4")),
    "predict translator hi --num-beams 1 --length-penalty 2": (USAGE, ("--length-penalty",)),
    "predict text hi --max-new-tokens 0": (USAGE, ("--max-new-tokens must be 1 or more, got 0",)),
    "predict text hi --temperature=-1": (USAGE, ("--temperature must be 0 or more",)),
    "predict text hi --temperature nan": (USAGE, ("--temperature must be 0 or more",)),
    "predict text hi --temperature 1 --top-p 0": (USAGE, ("--top-p must be above 0",)),
    "predict text hi --temperature 1 --top-p 1.5": (USAGE, ("--top-p", "at most 1")),
    "predict text hi --repetition-penalty 0": (USAGE, ("--repetition-penalty must be above 0",)),
    "predict text hi --num-beams 0": (USAGE, ("--num-beams must be 1 or more",)),
    "predict text hi --stop ''": (USAGE, ("--stop needs a text",)),
    # and those that a run has no use for
    "predict labels hi --max-new-tokens 3": (
        USAGE,
        ("--max-new-tokens: no effect on text-classification",),
    ),
    "predict labels hi --temperature 1 --top-k 2 --n-best 2 --stop x": (
        USAGE,
        ("--temperature, --top-k, --n-best, --stop: no effect on text-classification",),
    ),
    "predict labels --input LABELS -o o.csv --num-beams 4": (USAGE, ("--num-beams: no effect",)),
    "predict text hi --context-file TEXT": (USAGE, ("--context-file has no effect",)),
    # texts and files that do not fit
    "predict pairs LONG": (
        USAGE,
        ("a prompt of 302 tokens", "the model's 64 positions", "shorten it"),
    ),
    "predict pairs hi LONG --num-beams 2": (USAGE, ("a prompt of 302 tokens",)),
    "predict text SURROGATE": (DATA, ("text 1 is not UTF-8",)),
    "predict translator hi SURROGATE": (DATA, ("text 2 is not UTF-8",)),
    "evaluate translator X.src X.tgt X.src": (USAGE, ("two line-aligned",)),
    "evaluate translator X.src PAIRS": (DATA, ("x.src has 32 lines", "pairs.csv 33 lines")),
    "evaluate text X.src X.tgt": (USAGE, ("no column 'text'", "'source', 'target'")),
    "evaluate translator X.src": (USAGE, ("x.src: there is no column 'source'",)),
}  # fmt: skip


@pytest.mark.parametrize("command", WRONG_USE)
def test_wrong_use(command: str, trained: Path, tmp_path: Path, cli: Cli):
    code, parts = WRONG_USE[command]
    words = {
        "PAIRS": trained / "pairs.csv",
        "LABELS": trained / "labels.csv",
        "TEXT": tmp_path / "one-block.txt",
        "X.src": trained / "x.src",
        "X.tgt": trained / "x.tgt",
        "LONG": "x" * 300,
        "SURROGATE": "\udcff",
    }
    (tmp_path / "one-block.txt").write_text("a line\n" * 30)
    before = sorted(tmp_path.iterdir())
    given = shlex.split(command)
    if given[0] != "train":
        given[1] = str(trained / given[1])
    else:
        given += SMALL
    assert_refused(cli(*(words.get(word, word) for word in given)), code, *parts)
    assert sorted(tmp_path.iterdir()) == before


# Texts to continue


def generated(cli: Cli, run: Path, *arguments: str) -> list[str]:
    ended = cli("predict", run, *arguments, "--json")
    assert (ended.code, ended.err) == (0, "")
    key = "translation" if run.name == "translator" else "generated"
    return [one[key] for one in json.loads(ended.out)["predictions"]]


def test_of_a_long_text_the_end_is_continued(trained: Path, cli: Cli):
    """The model sees 32 tokens: what lies before changes nothing."""
    end = "a drill 1, 1 llird a\nMelone 2, 2"
    assert len(end) == 32
    given = [end, "x" * 300 + end, "other things " * 9 + end]
    first, *others = generated(cli, trained / "text", *given, "--max-new-tokens", "20")
    assert others == [first, first]
    (shorter,) = generated(cli, trained / "text", end[1:], "--max-new-tokens", "20")
    assert isinstance(shorter, str)


def test_unknown_characters_are_continued_too(trained: Path, cli: Cli):
    """The char tokenizer has no token for them, and the output never holds the unknown one."""
    for text in ("ŧħé quiçk", "🦉🦉", "\t\u0000", ""):
        (found,) = generated(cli, trained / "text", text, "--max-new-tokens", "5")
        assert len(found) == 5 and "[UNK]" not in found
        ended = cli("predict", trained / "text", text, "--max-new-tokens", "5")
        assert (ended.code, ended.out, ended.err) == (0, f"{text}{found}\n", "")


def test_a_text_that_begins_with_a_dash(trained: Path, cli: Cli):
    ended = cli("predict", trained / "text", "--max-new-tokens", "3", "--", "-5 owls")
    assert ended.code == 0 and ended.out.startswith("-5 owls") and len(ended.out) == 7 + 3 + 1
    refused = cli("predict", trained / "text", "-5 owls")
    assert_refused(refused, USAGE, "Put -- before a text that begins with a dash")


def test_several_outputs_of_each_text(trained: Path, cli: Cli):
    run = trained / "translator"
    ended = cli("predict", run, "heron 1", "plum", "--n-best", "3")
    assert ended.code == 0, ended.err
    lines = [line.split("\t", 1) for line in ended.out.splitlines()]
    assert len(lines) == 6
    found = json.loads(cli("predict", run, "heron 1", "plum", "--n-best", "3", "--json").out)
    listed = [
        [f"{one['score']:.4f}", one["translation"]]
        for prediction in found["predictions"]
        for one in (prediction, *prediction["alternatives"])
    ]
    assert lines == listed


# Stop strings, and outputs that are shown as they come


def test_a_stop_string_ends_an_output_and_is_no_part_of_it(trained: Path, cli: Cli):
    # Drawn, so that a model that has hardly learned does not repeat itself.
    options = ["--max-new-tokens", "40", "--temperature", "1.5", "--seed", "4"]
    for name in ("text", "bytes", "pairs", "translator"):
        run = trained / name
        (whole,) = generated(cli, run, "heron", *options)
        assert len(whole) > 8, name
        for stop in (whole[3], whole[4:6], whole[-2:]):
            (found,) = generated(cli, run, "heron", *options, "--stop", stop)
            expected = whole[: whole.index(stop)]
            assert found == (expected.strip() if name == "translator" else expected)
        (same,) = generated(cli, run, "heron", *options, "--stop", "never to be seen")
        assert same == whole


def test_the_first_of_several_stop_strings_counts(trained: Path, cli: Cli):
    options = ["--max-new-tokens", "30", "--temperature", "1.5"]
    (whole,) = generated(cli, trained / "text", "heron", *options)
    stops = [whole[9:11], whole[5], whole[7]]
    flags = [part for stop in stops for part in ("--stop", stop)]
    (found,) = generated(cli, trained / "text", "heron", *options, *flags)
    assert found == whole[: min(whole.index(stop) for stop in stops)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["text", "bytes", "pairs"])
def test_what_is_shown_as_it_comes_is_the_output(name: str, data: Any, loaded: dict[str, Any]):
    """The pieces together are the output, whatever ends it and however characters are cut."""
    run = loaded[name]
    seed = data.draw(st.integers(0, 30))
    options = {"max_new_tokens": 24, "temperature": 1.3, "seed": seed}
    (whole,) = run.predict("plum", **options)
    text = whole["generated"]
    stop: list[str] = []
    for _ in range(data.draw(st.integers(0, 2))):
        start = data.draw(st.integers(0, max(0, len(text) - 1)))
        length = data.draw(st.integers(1, 6))
        stop.append(text[start : start + length] or "never")
        if data.draw(st.booleans()):  # only its beginning comes
            stop[-1] += "~"
    pieces: list[str] = []
    (streamed,) = run.predict("plum", stop=stop, stream=pieces.append, **options)
    (silent,) = run.predict("plum", stop=stop, **options)
    assert streamed == silent
    assert "".join(pieces) == silent["generated"]
    assert "" not in pieces
    expected = min([text.index(s) for s in stop if s in text], default=len(text))
    assert silent["generated"] == text[:expected]


@pytest.fixture(scope="module")
def loaded(trained: Path) -> dict[str, hasten.Run]:
    return {name: hasten.load(trained / name) for name in ("text", "bytes", "pairs")}


def test_most_is_shown_before_the_end(loaded: dict[str, hasten.Run]):
    run = loaded["text"]
    pieces: list[str] = []
    options = {"max_new_tokens": 24, "temperature": 1.3}
    (found,) = run.predict("plum", stream=pieces.append, **options)
    assert len(pieces) == len(found["generated"]) == 24  # a character a token
    pieces.clear()
    run.predict("plum", stream=pieces.append, stop=["~~~"], **options)
    assert len(pieces) == 23 and len(pieces[-1]) == 2  # two characters are held back


def test_only_one_output_can_be_told(loaded: dict[str, hasten.Run]):
    with pytest.raises(UsageError, match="single output"):
        loaded["text"].predict(["a", "b"], stream=print)
    with pytest.raises(UsageError, match="single output"):
        loaded["text"].predict("a", stream=print, num_beams=2)


@pytest.mark.parametrize("name", ["text", "bytes", "pairs"])
def test_the_command_prints_the_same_whether_it_shows_as_it_comes(
    name: str, trained: Path, cli: Cli
):
    run = trained / name
    for seed in range(6):
        for stop in ([], ["--stop", "e"], ["--stop", " 1", "--stop", "\n"]):
            options = ["--max-new-tokens", "24", "--temperature", "1.3", "--seed", str(seed), *stop]
            shown = cli("predict", run, "plum €", *options)
            silent = cli("predict", run, "plum €", *options, "--n-best", "1")
            (found,) = generated(cli, run, "plum €", *options)
            prompt = "" if name == "pairs" else "plum €"
            expected = f"{prompt}{found}\n"
            assert (shown.code, shown.out, shown.err) == (0, expected, "")
            assert (silent.code, silent.out, silent.err) == (0, expected, "")
    beams = cli("predict", run, "plum", "--num-beams", "2", "--max-new-tokens", "6")
    (found,) = generated(cli, run, "plum", "--num-beams", "2", "--max-new-tokens", "6")
    assert beams.out == ("" if name == "pairs" else "plum") + found + "\n"


# Files


def test_lines_of_text_become_lines_of_outputs(trained: Path, cli: Cli):
    lines = ["heron 1", "", "  Säge  ", "中文字 €", "-- --"]
    Path("in.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("translator", "pairs", "text", "labels"):
        run = trained / name
        options = [] if name == "labels" else ["--max-new-tokens", "9"]
        ended = cli("predict", run, "--input", "in.txt", "--output", "out.txt", *options)
        assert (ended.code, ended.out) == (0, ""), ended.err
        wanted, lacking = ("label", "text") if name == "labels" else ("output", "output")
        assert f"line 2: the text is empty; no {wanted}" in ended.err
        assert ended.last.startswith("out.txt: 4 ") and f"1 without {lacking}" in ended.last
        found = Path("out.txt").read_text(encoding="utf-8").split("\n")
        assert len(found) == 6 and found[1] == found[5] == ""
        if name != "labels":
            trained_run = hasten.load(run)
            texts = [line for line in lines if line]  # as on the command line
            key = trained_run.task.prediction_columns[0]
            outputs = [
                " ".join(one[key].split()) for one in trained_run.predict(texts, max_new_tokens=9)
            ]
            assert [found[0], *found[2:5]] == outputs


def test_a_table_keeps_its_columns_and_gets_all_outputs(trained: Path, cli: Cli):
    rows = [("1", "heron 1"), ("2", ""), ("3", 'plum, € "quoted"')]
    write_rows(Path("in.csv"), rows, ("id", "source"))
    run = trained / "translator"
    ended = cli("predict", run, "--input", "in.csv", "-o", "out.jsonl", "--n-best", "2", "--json")
    assert ended.code == 0, ended.err
    counts = json.loads(ended.out)
    assert (counts["num_labelled"], counts["num_unlabelled"]) == (2, 1)
    entries = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert [list(entry) for entry in entries] == [
        ["id", "source", "translation", "score", "alternatives"]
    ] * 3
    assert [(entry["id"], entry["source"]) for entry in entries] == rows
    assert entries[1]["translation"] is None and entries[1]["alternatives"] is None
    wanted = hasten.load(run).predict([rows[0][1], rows[2][1]], num_return=2)
    for entry, one in zip((entries[0], entries[2]), wanted, strict=True):
        assert entry["translation"] == one["translation"]
        assert entry["score"] == pytest.approx(one["score"], abs=1e-6)
        assert [a["translation"] for a in entry["alternatives"]] == [
            a["translation"] for a in one["alternatives"]
        ]
    ended = cli("predict", run, "--input", "in.csv", "-o", "out.csv")
    assert ended.code == 0, ended.err
    assert Path("out.csv").read_text("utf-8").splitlines()[0] == "id,source,translation,score"


def test_two_aligned_files_are_measured(trained: Path, cli: Cli):
    flags = write_aligned("y", PAIRS[:9])
    ended = cli("evaluate", trained / "translator", flags[1], flags[3], "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["num_examples"] == found["num_decoded"] == 9 and found["num_rejected"] == 0
    again = hasten.load(trained / "translator").evaluate((flags[1], flags[3]))
    for name in ("loss", "bleu", "chrf", "exact_match", "token_error_rate"):
        assert found[name] == pytest.approx(again[name])
    shown = cli("evaluate", trained / "translator", flags[1], flags[3])
    assert shown.code == 0 and shown.out.startswith("y.src + y.tgt: BLEU ")
    short = write_aligned("z", PAIRS[:8])
    refused = cli("evaluate", trained / "translator", flags[1], short[3])
    assert_refused(refused, DATA, "y.src has 9 lines", "z.tgt 8 lines")
