"""Signals, broken pipes and run folders in every state, at the command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hasten
from builders import labelled_rows, write_rows
from conftest import Ended
from hasten.cli.console import PlainConsole
from hasten.cli.main import Stopped
from hasten.core.errors import UsageError
from hasten.core.files import FileLock

SIZE = [
    *("--model.num_layers", "1", "--model.hidden_size", "16", "--model.num_heads", "2"),
    *("--eval.baseline", "false", "--train.tokens_per_step", "200", "--train.log_every", "1"),
]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("train.csv"), labelled_rows(90), ("text", "label"))


def assert_clean(*folders: Path) -> None:
    for folder in folders:
        left = [str(p) for p in folder.rglob("*") if ".partial" in p.name or "stdin-" in p.name]
        assert not left, left


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[], object]) -> None:
    """Does something in the middle of training, when a progress line is printed."""

    def step_and_do(self: PlainConsole, info: Any) -> None:
        if info.step == step:
            do()

    monkeypatch.setattr(PlainConsole, "step", step_and_do)


@pytest.fixture
def unfinished(cli, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that Ctrl-C stopped at its third step."""
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        ended = cli("train", "train.csv", *SIZE, "--epochs", "3", "-o", "run")
    assert ended.code == 130
    return Path("run")


# Signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_training_saves_and_says_how_to_go_on(
    number: signal.Signals, cli, own_cache: Path, tmp_path: Path, monkeypatch
):
    train = ["train", "train.csv", *SIZE, "--epochs", "3"]
    assert cli(*train, "-o", "whole").code == 0
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(number))
        ended = cli(*train, "-o", "a run")
    assert (ended.code, ended.out) == (128 + number, "")
    assert ended.last == "hasten: stopped; go on with: hasten train --resume 'a run'"
    assert [p.name for p in Path("a run/checkpoints").iterdir()] == ["step-00000004"]
    assert not Path("a run/model").exists()
    assert_clean(tmp_path, own_cache)
    again = cli(*shlex.split(ended.last.partition("go on with: hasten ")[2]))
    assert again.code == 0 and "resumed at step 4 of " in again.err
    whole = cli("train", "--resume", "whole")
    assert again.out.splitlines()[:5] == whole.out.splitlines()[:5]  # the same metrics
    model = Path("model/model.safetensors")
    assert ("a run" / model).read_bytes() == ("whole" / model).read_bytes()


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "moment",
    [
        "hasten.training.session.choose_folder",
        "hasten.training.build.prepare_data",
        "hasten.data.corpus._build",
        "hasten.data.tokens._build",
        "hasten.training.prepare.train_tokenizer",
        "hasten.training.session.build_loop",
        "hasten.training.folder.describe_machine",
        "hasten.training.folder._write_json",
    ],
)
def test_a_signal_before_the_first_step_leaves_nothing(
    moment: str, number: signal.Signals, cli, own_cache: Path, tmp_path: Path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(moment, lambda *_, **__: signal.raise_signal(number))
        ended = cli("train", "train.csv", *SIZE, "-o", "deep/run")
    assert (ended.code, ended.out) == (128 + number, "")
    assert ended.last == "hasten: stopped; nothing half-done is kept."
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    assert left <= {"train.csv", "deep"}
    assert_clean(own_cache)
    assert cli("train", "train.csv", *SIZE, "--epochs", "1", "-o", "deep/run").code == 0


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "moment", ["hasten.training.session.MetricsLog", "hasten.training.session.finish_run"]
)
def test_a_signal_outside_the_steps_of_a_run_names_the_run(
    moment: str, number: signal.Signals, cli, tmp_path: Path, monkeypatch
):
    """Between the folder and the first step, and while the finished model is measured."""
    with monkeypatch.context() as patch:
        patch.setattr(moment, lambda *_: signal.raise_signal(number))
        ended = cli("train", "train.csv", *SIZE, "--epochs", "1", "-o", "run")
    assert (ended.code, ended.out) == (128 + number, "")
    assert ended.last == "hasten: stopped; go on with: hasten train --resume run"
    assert_clean(tmp_path)
    assert cli("train", "--resume", "run").code == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_labelling_leaves_no_file(number, cli, tmp_path: Path, monkeypatch):
    assert cli("train", "train.csv", *SIZE, "--epochs", "1", "-o", "run").code == 0
    before = {p.name for p in tmp_path.iterdir()}

    def stop(*_: object) -> None:
        assert [p for p in tmp_path.iterdir() if ".partial-" in p.name]  # it was being written
        signal.raise_signal(number)

    monkeypatch.setattr("hasten.training.run.Run.predict_rows", stop)
    ended = cli("predict", "run", "--input", "train.csv", "-o", "out.csv")
    assert (ended.code, ended.err) == (
        128 + number,
        "hasten: stopped; nothing half-done is kept.\n",
    )
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_signal_that_falls_into_a_callback_is_not_lost(cli, monkeypatch: pytest.MonkeyPatch):
    """Python ignores errors in callbacks of weak references, and imports run many of these."""

    class Thing:
        pass

    def busy(*_: object, **__: object) -> None:
        thing = Thing()
        kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        assert kept() is None
        end = time.monotonic() + 5
        while time.monotonic() < end:
            pass
        raise AssertionError("Ctrl-C was lost")

    monkeypatch.setattr("hasten.data.inspection.inspect_file", busy)
    assert cli("inspect", "train.csv").code == 130


def test_a_signal_whose_error_is_replaced_is_not_lost(cli, monkeypatch: pytest.MonkeyPatch):
    """As modules written in C do with whatever happens while they are imported."""

    def busy(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise ImportError("numpy failed to import") from None

    monkeypatch.setattr("hasten.data.inspection.inspect_file", busy)
    result = cli("inspect", "train.csv")
    assert (result.code, result.err) == (143, "hasten: stopped; nothing half-done is kept.\n")


def test_what_signals_did_before_is_put_back(cli):
    before = [signal.getsignal(number) for number in SIGNALS]
    assert cli("--version").code == 0
    assert cli("inspect", "none.csv").code == 3
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not issubclass(Stopped, Exception)


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hasten", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def wait_for_import(process: subprocess.Popen[str], name: str) -> None:
    """Returns when a child with `-X importtime` has imported a module."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == name:
            return
    pytest.fail(f"ended without importing {name}")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
def test_a_signal_while_the_command_starts(number: signal.Signals, seconds: float, tmp_path: Path):
    """From its first imports on, which take most of the first second, until it reads its input."""
    command = [sys.executable, "-X", "importtime", "-m", "hasten", "inspect", "-"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None and process.stdout is not None
    wait_for_import(process, "hasten.cli")
    time.sleep(seconds)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    told = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, out) == (128 + number, "")
    assert told == ["hasten: stopped; nothing half-done is kept."]
    assert [p.name for p in tmp_path.iterdir()] == ["train.csv"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_so(number: signal.Signals):
    """As after nohup, and with SIGINT for what a shell runs in the background."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "hasten", "--version"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    )  # fmt: skip
    wait_for_import(process, "hasten.cli")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{hasten.__version__}\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_real_processes_stop_and_go_on(number: signal.Signals, own_cache: Path, tmp_path: Path):
    """A child is stopped in training; the command it prints is run as it stands."""
    slow = ["--epochs", "400", "--train.learning_rate", "1e-9", "--eval.patience", "1"]
    process = start("train", "train.csv", *SIZE, *slow, "--eval.metric", "loss", "-o", "run")
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if line.startswith("step "):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    if process.returncode == 0:  # it had been faster
        pytest.fail(seen + err)
    assert process.returncode == 128 + number and out == ""
    assert "Traceback" not in err
    command = re.search(r"^hasten: stopped; go on with: (hasten train --resume run)$", err, re.M)
    assert command is not None, err
    assert_clean(tmp_path, own_cache)
    script = Path(sys.executable).with_name("hasten")
    done = subprocess.run([script, *command[1].split()[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed at step " in done.stderr and "stopped early" in done.stdout
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_real_process_that_is_still_reading_leaves_nothing(
    number: signal.Signals, own_cache: Path, tmp_path: Path
):
    process = start("train", "-", *SIZE, "-o", "run", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("text,label\n" + "some text,a\n" * 20_000)
    process.stdin.flush()
    end = time.monotonic() + 60
    while not list(own_cache.glob("stdin-*/standard-input.csv")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert err == "hasten: stopped; nothing half-done is kept.\n"
    assert [p.name for p in tmp_path.iterdir()] == ["train.csv"]
    assert list(own_cache.iterdir()) == []


# Pipes


@pytest.mark.slow
def test_a_reader_that_goes_away(cli, tmp_path: Path):
    """`| head -1` ends what is printed, quietly, and never the work."""
    hasten = shlex.join([sys.executable, "-m", "hasten"])
    commands = (
        f"{hasten} --help-all | head -1",
        f"{hasten} train train.csv {shlex.join(SIZE)} --epochs 1 -o run 2>&1 | head -1",
        f"{hasten} predict run {shlex.join(['a text'] * 9000)} | head -1",
    )
    script = "\n".join(f"{command}\necho ${{PIPESTATUS[0]}}" for command in commands)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[1::2] == ["0", "0", "0"], done.stdout
    assert lines[0].startswith("Every key") and lines[4].endswith("a text")
    assert done.stderr == ""
    assert (tmp_path / "run" / "result.json").is_file()  # trained to its end
    full = subprocess.run(
        ["bash", "-c", f"{hasten} --help > /dev/full"], capture_output=True, text=True
    )
    assert full.returncode == 8 and full.stderr == "hasten: No space left on device.\n"


# Run folders


def refused(ended: Ended, code: int, *parts: str) -> None:
    assert (ended.code, ended.out) == (code, ""), ended
    assert ended.last.startswith("hasten: ") and "Traceback" not in ended.err
    for part in parts:
        assert part in ended.last, (part, ended.last)


def test_an_unfinished_run_cannot_be_used_yet(unfinished: Path, cli):
    for arguments in (["predict", unfinished, "hi"], ["evaluate", unfinished, "train.csv"]):
        refused(cli(*arguments), 2, "run is not finished; go on with: hasten train --resume run")
    shutil.rmtree(unfinished / "checkpoints")  # as after kill -9 before the first checkpoint
    refused(cli("predict", unfinished, "hi"), 2, "is not finished")
    with pytest.raises(UsageError, match="is not finished"):
        hasten.load(unfinished)


def test_a_run_in_use_is_left_alone(unfinished: Path, cli):
    lock = FileLock(unfinished / ".lock")
    assert lock.acquire()
    before = {str(p): p.stat().st_mtime_ns for p in unfinished.rglob("*")}
    refused(cli("train", "--resume", unfinished), 8, f"run is in use by process {os.getpid()}")
    refused(cli("train", "train.csv", "-o", unfinished), 2, "run exists already", "--resume run")
    assert {str(p): p.stat().st_mtime_ns for p in unfinished.rglob("*")} == before
    lock.release()
    assert cli("train", "--resume", unfinished).code == 0


def test_a_run_whose_data_changed(unfinished: Path, cli):
    content = Path("train.csv").read_bytes()
    Path("train.csv").write_bytes(content.replace(b"the", b"teh", 1))
    refused(
        cli("train", "--resume", unfinished), 3,
        "train.csv has changed since the run began", "put the old file back",
    )  # fmt: skip
    Path("train.csv").unlink()
    refused(cli("train", "--resume", unfinished), 3, "train.csv: the run's data file is gone")
    Path("train.csv").write_bytes(content)
    ended = cli("train", "--resume", unfinished, "--json")
    assert ended.code == 0 and json.loads(ended.out)["run"] == "run"


def test_a_run_that_is_damaged(unfinished: Path, cli):
    whole = Path("whole")
    shutil.copytree(unfinished, whole)
    (step,) = (unfinished / "checkpoints").iterdir()
    for file, code, parts in (
        (step / "model.safetensors", 4, ("step-00000003/model.safetensors", "SHA-256")),
        (step / "manifest.json", 4, ("step-00000003/manifest.json",)),
        (unfinished / "config.yaml", 4, ("run cannot be read",)),
        (unfinished / "data.json", 4, ("run cannot be read",)),
        (unfinished / "tokenizer.json", 4, ("run/tokenizer.json",)),
    ):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        refused(cli("train", "--resume", unfinished), code, *parts)
        file.write_bytes(content)
    (unfinished / "config.yaml").unlink()
    refused(cli("train", "--resume", unfinished), 2, "run is not a run folder", "config.yaml")
    assert cli("train", "--resume", whole).code == 0


def test_two_runs_that_begin_at_once(cli, own_cache: Path, tmp_path: Path, monkeypatch):
    """The one that comes second to the folder is refused and leaves the first one whole."""
    original = hasten.training.folder.describe_data

    def slow(config: Any, data: Any, partial: Path, folder: Path) -> dict[str, Any]:
        folder.mkdir()
        (folder / "config.yaml").write_text("of the first")
        return original(config, data, partial, folder)

    monkeypatch.setattr("hasten.training.folder.describe_data", slow)
    ended = cli("train", "train.csv", *SIZE, "-o", "run")
    refused(ended, 2, "run has been created by another process", "--output")
    assert [p.name for p in Path("run").iterdir()] == ["config.yaml"]
    assert_clean(tmp_path, own_cache)


def test_out_of_memory_says_what_to_lower(cli, monkeypatch: pytest.MonkeyPatch):
    def hungry(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("hasten.training.loop.run_step", hungry)
    ended = cli("train", "train.csv", *SIZE, "-o", "run")
    refused(ended, 5, "not enough memory", "--train.micro_batch_tokens")


def test_divergence_says_where_and_what_to_lower(cli):
    ended = cli("train", "train.csv", *SIZE, "--train.learning_rate", "1e30", "--epochs", "30",
                "--train.gradient_clip", "0", "--optim.optimizer", "sgd", "-o", "run")  # fmt: skip
    refused(ended, 6, "5 steps in a row", "train.csv lines ", "lower --train.learning_rate")
    assert ended.err.count("warning: loss or gradient not finite") == 5


# The demo, with a model that takes no time


def test_the_demo_leaves_what_it_advertises(cli, own_cache: Path, tmp_path: Path, monkeypatch):
    from hasten.data import keywords
    from hasten.training import run

    write, train = keywords.write_keyword_files, run.train
    tiny = {
        "model.num_layers": 1, "model.hidden_size": 16, "model.num_heads": 2,
        "train.epochs": 1, "train.tokens_per_step": 4096,
    }  # fmt: skip

    made = tmp_path / "made"
    made.mkdir()
    write(made)
    with (made / "train.csv").open("r+", encoding="utf-8") as file:
        lines = file.readlines()
        file.seek(0)
        file.truncate()
        file.writelines(lines[:400])

    def few(folder: Path) -> None:
        shutil.copytree(made, folder, dirs_exist_ok=True)

    def quick(*arguments: Any, settings: dict[str, Any], **more: Any) -> Any:
        return train(*arguments, settings={**settings, **tiny}, **more)

    monkeypatch.setattr("hasten.data.keywords.write_keyword_files", few)
    monkeypatch.setattr("hasten.training.run.train", quick)
    ended = cli("demo", "--seed", "3")
    assert ended.code == 0, ended.err
    assert "seed: 3" in Path("runs/demo-1/config.yaml").read_text()
    lines = ended.out.splitlines()
    assert lines[0].endswith(": runs/demo-1-data/train.csv")
    assert "compared by accuracy on test, trained on the same rows:" in lines
    shown = lines[lines.index("some of the test set:") + 1 :][:10]
    assert len(shown) == 10 and all("___" in line for line in shown[::2])
    assert all(line.endswith("; right)") or "; wrong, it was " in line for line in shown[1::2])
    by_hand = [line for line in lines if line.startswith("  hasten ")]
    assert [line.split()[1] for line in by_hand] == ["inspect", "train", "evaluate", "predict"]
    evaluated = next(row for row in lines if row.startswith("test: accuracy")).split()[2]
    for line in by_hand:
        if " train " not in line:
            again = cli(*shlex.split(line)[1:])
            assert again.code == 0
            if " evaluate " in line:
                assert again.out.split()[2] == evaluated
    assert cli("demo", "--quiet", "-o", "other").code == 0 and Path("other-data/test.csv").is_file()
    # Stopped by Ctrl-C, it says how to go on, as train does.
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    tiny["train.log_every"] = 1
    stopped = cli("demo")
    assert stopped.code == 130
    assert stopped.last == "hasten: stopped; go on with: hasten train --resume runs/demo-2"
    assert_clean(tmp_path, own_cache)
