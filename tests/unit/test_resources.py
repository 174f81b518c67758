"""Free memory, also where a container or a batch system sets a limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.parallel import resources
from hasten.parallel.resources import assumed_resources, available_memory


def limit(folder: Path, names: tuple[str, str, str], most: str, used: int, cached: int) -> None:
    """Writes what the kernel shows of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\nother 7\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_each_group_above_a_process_limits_it(tmp_path: Path):
    own = tmp_path / "cgroup"
    own.write_text("0::/batch/job\n")
    limit(tmp_path / "batch", V2, "1000", 300, 100)
    limit(tmp_path / "batch" / "job", V2, "max", 250, 0)
    assert resources._free_of_groups(tmp_path, own) == [800]
    limit(tmp_path / "batch" / "job", V2, "200", 250, 0)
    assert resources._free_of_groups(tmp_path, own) == [800, 0]


def test_version_1_and_no_groups_at_all(tmp_path: Path):
    own = tmp_path / "cgroup"
    assert resources._free_of_groups(tmp_path, own) == []
    own.write_text("7:cpu:/elsewhere\n4:memory:/\n")
    limit(tmp_path / "memory", V1, "5000", 1500, 500)
    assert resources._free_of_groups(tmp_path, own) == [4000]


def test_processes_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resources, "_free_of_host", lambda: 900)
    monkeypatch.setattr(resources, "_free_of_groups", lambda: [1000])
    assert available_memory(torch.device("cpu"), 3) == 300
    found = assumed_resources(3, torch.device("cpu"))
    assert (found.memory_bytes, found.local_size, found.is_measured) == (300, 3, False)
