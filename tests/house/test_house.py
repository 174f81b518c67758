"""The house rules, applied to this repository. ``test_house_rules`` tests the rules themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from exemptions import EXEMPTIONS
from house_rules import RULES, Source, check, no_machine_paths
from source_tree import load_sources

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = load_sources(REPOSITORY / "src")
TEXTS = ("*.md", "Makefile", "docs/**/*.md", "examples/**/*.py", "benchmarks/**/*.py")


def test_the_sources_are_found():
    paths = {source.path for source in SOURCES}
    assert {"hasten/core/errors.py", "hasten/optim/state.py"} <= paths


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    failures, _ = check(rule, SOURCES, EXEMPTIONS)
    assert not failures, f"{RULES[rule].__doc__}\n" + "\n".join(failures)


@pytest.mark.parametrize("rule", RULES)
def test_no_exemption_has_outlived_its_need(rule):
    _, unneeded = check(rule, SOURCES, EXEMPTIONS)
    assert not unneeded, f"remove from exemptions.py: {unneeded}"


def test_every_exemption_names_a_rule_once_and_says_why():
    keys = [(entry.rule, entry.where) for entry in EXEMPTIONS]
    assert len(keys) == len(set(keys))
    for entry in EXEMPTIONS:
        assert entry.rule in RULES, entry
        assert len(entry.reason.split()) >= 4, f"say why: {entry}"


def test_texts_name_no_path_of_one_machine():
    files = sorted({path for glob in TEXTS for path in REPOSITORY.glob(glob)})
    texts = [
        Source(path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8"))
        for path in files
    ]
    assert not list(no_machine_paths(texts))
