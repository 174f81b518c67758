"""What every test rests on: one thread, a cache that is not the person's own, and the command."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before the first import of torch, and for child processes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from hasten.core.products import using_library

# The same examples in every run: a test that fails now and then is no proof of anything.
settings.register_profile("hasten", derandomize=True, deadline=None, database=None)
settings.load_profile("hasten")


def pytest_configure() -> None:
    """Restores what Ctrl-C does.

    A runner that starts the tests in the background may leave SIGINT ignored, which child
    processes would inherit: then no Ctrl-C could be tested.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """An empty cache for one test."""
    folder = tmp_path_factory.mktemp("own-cache")
    monkeypatch.setenv("HASTEN_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def library_put_back() -> Iterator[None]:
    """What one test makes multiply matrices, the next does not inherit."""
    with using_library():
        yield


@pytest.fixture
def double_precision() -> Iterator[None]:
    """Modules built in the test hold float64 weights and tables."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it wrote to each stream."""

    code: Any
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of standard error."""
        return self.err.rstrip("\n").rpartition("\n")[2]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs the command in this process."""
    from hasten.cli.main import main  # here, so that no other test needs the command

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return Ended(ended.value.code, *capsys.readouterr())

    return run
