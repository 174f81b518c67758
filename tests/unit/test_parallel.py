"""What is decided before processes start, and how those that hang are found."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.config.load import build_config
from hasten.config.schema import ParallelConfig
from hasten.core.errors import LostProcessError, UsageError
from hasten.core.ranks import ALONE
from hasten.core.shards import copy_whole_, is_sharded, local_part, placed_like, whole
from hasten.data.order import cut_micro_batches, deal_micro_batches
from hasten.model.transformer import Transformer
from hasten.parallel.apply import check_layout
from hasten.parallel.heartbeat import FOLDER_VARIABLE, Watched, beating, watching
from hasten.parallel.launch import _exit_code
from hasten.parallel.layout import AXES, Layout, choose_layout
from hasten.parallel.place import Place, find_place, first_node
from hasten.parallel.world import joined
from hasten.training import session
from hasten.training.session import resumed_config

DEGREES = st.integers(1, 8)


@given(st.builds(Layout, *[DEGREES] * len(AXES)))
def test_a_layout_is_read_as_it_is_written(layout: Layout):
    assert choose_layout(str(layout), layout.size) == layout
    assert choose_layout(str(layout), None) == layout
    assert layout.size == math.prod(getattr(layout, axis) for axis in AXES)
    assert choose_layout("auto", layout.size) == Layout(replicate=layout.size)


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({"num_heads": 6}, "tensor=4", "must divide the 6 heads of attention: 1, 2, 3, 6 would"),
        ({"num_heads": 6}, "tensor=2,context=2", "must divide the 6 heads"),
        ({"num_heads": 4, "num_kv_heads": 2}, "tensor=4", "the 2 key/value heads: 1, 2 would"),
        ({"feed_forward_size": 75}, "tensor=2", "--model.feed_forward_size 74 would fit"),
        ({"stochastic_depth": 0.1}, "context=2", "stochastic_depth does not go with"),
        ({"positions": "relative"}, "tensor=2", "relative positions do not go with tensor or"),
        ({"positions": "relative"}, "context=2", "relative positions do not go with tensor or"),
        ({"positions": "relative"}, "pipeline=2", "blocks with relative positions share a weight"),
        (
            {"hidden_size": 32, "num_heads": 8, "max_positions": 4},
            "context=8",
            "at most 4: 4 or less would fit",
        ),
        ({"num_layers": 3}, "pipeline=4", "--model.num_layers 4 would fit"),
        ({"architecture": "encoder_decoder"}, "pipeline=2", "encoder_decoder cannot be cut"),
    ],
)
def test_a_model_that_cannot_be_spread_is_refused(options: Any, layout: str, message: str):
    settings = {"vocab_size": 9, "hidden_size": 24, "num_heads": 4, "dropout": 0.0, **options}
    config = Transformer(**settings).config
    with pytest.raises(UsageError) as refused:
        check_layout(config, choose_layout(layout, None), "1f1b")
    assert message in str(refused.value)
    check_layout(config, Layout(replicate=3, shard=5), "1f1b")


@pytest.mark.parametrize(
    ("wanted", "processes", "message"),
    [
        (
            "shards=2",
            2,
            "no axis 'shards'; there are pipeline, replicate, shard, context, tensor. Did",
        ),
        ("shard", 2, "one whole number for each axis"),
        ("shard=0", 2, "one whole number for each axis"),
        ("shard=2,shard=2", 4, "one whole number for each axis"),
        ("shard=1.5", 2, "one whole number for each axis"),
        ("shard=2", 4, "2 processes, and there are 4; --parallel replicate=2,shard=2 would fit"),
        ("replicate=4", 2, "4 processes, and there are 2; --parallel replicate=2 would fit"),
        ("shard=3", 4, "3 processes, and there are 4."),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(wanted: str, processes: int, message: str):
    with pytest.raises(UsageError, match=r".") as refused:
        choose_layout(wanted, processes)
    assert message in str(refused.value)


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "1234",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-07,9],login",
    "SLURM_JOB_ID": "123456",
}


def test_a_process_finds_its_place_in_the_environment():
    assert find_place(TORCHRUN) == Place(5, 8, 1, 4, "node7", 1234)
    assert find_place(SRUN) == Place(5, 8, 1, 4, "gpu03", 23456)
    assert find_place({**SRUN, "MASTER_ADDR": "a", "MASTER_PORT": "7"}) == Place(5, 8, 1, 4, "a", 7)
    assert find_place({}) is None
    # A program that a batch script starts by itself is alone, however many tasks the job has.
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None


@pytest.mark.parametrize(
    "change", [{"RANK": "x"}, {"RANK": "8"}, {"WORLD_SIZE": ""}, {"MASTER_PORT": "http"}]
)
def test_an_environment_that_contradicts_itself_is_refused(change: dict[str, str]):
    with pytest.raises(UsageError):
        find_place({**TORCHRUN, **change})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-07,9],x", "gpu03"), ("a,b", "a"), ("node-1", "node-1"), ("", "127.0.0.1")],
)
def test_the_first_node_of_a_list(nodes: str, first: str):
    assert first_node(nodes) == first


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch):
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    with joined("auto", None, "cpu") as ranks:
        assert ranks is ALONE and ranks.is_main and ranks.gather("x") == ["x"]
        assert ranks.on_main(lambda: 3) == 3 and ranks.any([True, False]) == [True, False]
        assert ranks.share([1, 2, 3]) == [1, 2, 3]
    with pytest.raises(UsageError), joined("shard=2", None, "cpu"):
        pass


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=50),
    budget=st.integers(1, 200),
    num_ranks=st.integers(1, 6),
)
def test_micro_batches_are_dealt_evenly_and_completely(
    lengths: list[int], budget: int, num_ranks: int
):
    sizes, batch = np.array(lengths), np.arange(len(lengths))
    rounds = deal_micro_batches(batch, sizes, budget, num_ranks)
    assert all(len(pieces) == num_ranks for pieces in rounds)
    dealt = np.concatenate([piece for pieces in rounds for piece in pieces])
    assert sorted(dealt.tolist()) == batch.tolist()
    for pieces in rounds:
        assert any(len(piece) for piece in pieces)
        assert all(len(piece) <= 1 or sizes[piece].sum() <= budget for piece in pieces)
    shares = [sum(int(sizes[pieces[r]].sum()) for pieces in rounds) for r in range(num_ranks)]
    assert max(shares) - min(shares) <= max(lengths)
    if num_ranks == 1:
        alone = cut_micro_batches(batch, sizes, budget)
        assert [pieces[0].tolist() for pieces in rounds] == [piece.tolist() for piece in alone]


def test_a_plain_tensor_is_its_own_part_and_whole():
    tensor, other = torch.arange(3.0), torch.zeros(3)
    assert local_part(tensor) is tensor and whole(tensor) is tensor and not is_sharded(tensor)
    assert placed_like(tensor, other) is tensor
    copy_whole_(other, tensor)
    assert torch.equal(other, tensor)


# Hanging and failing


def test_a_process_that_was_stopped_is_killed_and_one_that_waits_is_not(tmp_path: Path):
    code = (
        "import time\n"
        "from hasten.parallel.heartbeat import beating\n"
        "with beating():\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, FOLDER_VARIABLE: str(tmp_path)}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env={**environment, "RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        with watching(tmp_path, 3.0) as watched:
            children[1].send_signal(signal.SIGSTOP)
            assert children[1].wait(30) == -signal.SIGKILL
            assert children[0].poll() is None
            # One that does not end when another has gone is killed too.
            assert children[0].wait(30) == -signal.SIGKILL
        assert list(watched.hung) == [1] and watched.hung[1] > 3.0 and watched.stopped == {0}
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_signs_of_life_end_with_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "4")
    with beating():
        assert (tmp_path / "4").read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())
    for code, is_left in ((143, False), (1, True)):  # the sign of one that fails stays behind
        with pytest.raises(SystemExit), beating():
            raise SystemExit(code)
        assert (tmp_path / "4").exists() is is_left
    (tmp_path / "4").unlink()
    monkeypatch.delenv(FOLDER_VARIABLE)
    with beating():
        assert not list(tmp_path.iterdir())


def failure(exitcode: int, timestamp: int = 0) -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode, pid=99, timestamp=timestamp)


@pytest.mark.parametrize(
    ("failures", "found"),
    [
        ({0: failure(7, 1), 1: failure(-9, 2)}, "rank 1 (process 99 on {HOST}) was killed"),
        ({0: failure(7, 1), 1: failure(1, 2)}, "rank 1 (process 99 on {HOST}) ended with"),
        ({0: failure(1, 2), 2: failure(1, 1)}, "rank 2 (process 99 on {HOST}) ended with"),
        ({0: failure(-9, 1), 5: failure(1, 2)}, "rank 5 (process 99 on {HOST}) failed with Oh: no"),
        ({0: failure(-9, 1), 1: failure(7, 2)}, "rank 1 (process 99 on {HOST}) ended with"),
        ({3: failure(-9)}, "gave no sign of life for 21 s"),
        ({0: failure(3), 1: failure(-15)}, 3),
        ({0: failure(143)}, 143),
        ({0: failure(130), 1: failure(130)}, 130),
        ({0: failure(143, 2), 1: failure(-9, 1)}, "rank 1 (process 99 on {HOST}) was killed"),
        ({0: failure(143, 1), 1: failure(-9, 2)}, "rank 1 (process 99 on {HOST}) was killed"),
    ],
)
def test_who_failed_first_is_named_unless_it_said_so_itself(
    failures: dict[int, SimpleNamespace], found: str | int
):
    watched = Watched(hung={3: 21.0}, stopped={0}, causes={5: "Oh: no"})
    if isinstance(found, int):
        assert _exit_code(failures, watched) == found
        return
    with pytest.raises(LostProcessError) as lost:
        _exit_code(failures, watched)
    wanted = found.replace("{HOST}", socket.gethostname())
    assert wanted in str(lost.value) and lost.value.exit_code == 7


@pytest.mark.parametrize(
    ("asked", "processes", "layout", "threads"),
    [
        ({"max_restarts": 3}, 2, "pipeline=2", 5),
        ({"processes": 2}, 2, "pipeline=2", 5),
        ({"processes": 2, "layout": "shard=2"}, 2, "shard=2", "auto"),
        ({"layout": "shard=3"}, "auto", "shard=3", "auto"),
        ({"processes": 3}, 3, "auto", "auto"),
    ],
)
def test_a_resumed_run_keeps_what_nobody_asked_for(
    asked: dict[str, Any],
    processes: int | str,
    layout: str,
    threads: int | str,
    monkeypatch: pytest.MonkeyPatch,
):
    own = {"processes": 2, "layout": "pipeline=2", "schedule": "gpipe", "timeout_seconds": 7.0}
    values = {f"parallel.{name}": value for name, value in own.items()}
    values["parallel.stage_costs"] = (0.5, 1.0, 2.0)
    saved = build_config(overrides={**values, "train.num_threads": 5})
    monkeypatch.setattr(session, "read_folder", lambda folder: (saved, {}))
    assert resumed_config(Path("run")) == saved
    found = resumed_config(Path("run"), ParallelConfig(**asked))
    assert (found.parallel.processes, found.parallel.layout) == (processes, layout)
    assert found.parallel.max_restarts == asked.get("max_restarts", 0)
    assert (found.parallel.schedule, found.parallel.timeout_seconds) == ("gpipe", 7.0)
    assert found.parallel.stage_costs == (0.5, 1.0, 2.0)
    assert found.train.num_threads == threads
