"""Rates that BART and its kin drop at in training and nothing here does: said, and written back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from builders import Recorder, write_rows
from hasten.config.load import build_config
from hasten.core.errors import DamagedError
from hasten.model.pretrained.reading import config_of, load_pretrained
from hasten.model.pretrained.writing import save_pretrained
from hasten.training.build import plan_run
from hasten.training.export import export_run
from hasten.training.session import start_run
from pretrained_folders import LANGUAGES, write_text_model

pytest.importorskip("transformers")

RATES = {"activation_dropout": 0.25, "encoder_layerdrop": 0.05, "decoder_layerdrop": 0.0}
TWO = {"tokenizer.source_language": "de", "tokenizer.target_language": "en"}


def written(kind: str, folder: Path, rates: dict[str, Any]) -> Path:
    write_text_model(folder, kind)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **rates}))
    return folder


def rates_of(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "config.json").read_text())
    return {key: content[key] for key in RATES}


@pytest.mark.parametrize("kind", ["bart", "mbart", "marian", "m2m_100"])
def test_they_are_written_back_as_they_were(kind: str, tmp_path: Path):
    folder = written(kind, tmp_path / kind, RATES)
    loaded = load_pretrained(folder, head="language_modelling")
    (tmp_path / "again").mkdir()
    family = save_pretrained(tmp_path / "again", loaded.model.config, loaded.model.state_dict())
    assert family.name == loaded.family.name
    assert rates_of(tmp_path / "again") == RATES


@pytest.mark.parametrize("kind", ["bart", "m2m_100"])
def test_a_run_says_that_they_are_not_used_and_exports_them(kind: str, tmp_path: Path):
    pairs = [("the old apple", "apple"), ("one new saw", "saw")] * 20
    data = write_rows(tmp_path / "pairs.csv", pairs, ("source", "target"))
    folder = written(kind, tmp_path / kind, RATES)
    settings = {
        "data.train": str(data),
        "model.pretrained": str(folder),
        "train.epochs": 1,
        "eval.baseline": False,
        **(TWO if kind in LANGUAGES else {}),
    }
    recorder = Recorder()
    start_run(build_config(overrides=settings), tmp_path / "run", recorder)
    (said,) = [note for note in recorder.notes if "not used in training" in note]
    assert said.endswith("written back: activation_dropout 0.25, encoder_layerdrop 0.05")
    shutil.rmtree(folder)
    export_run(tmp_path / "run", "huggingface", tmp_path / "out")
    assert rates_of(tmp_path / "out") == RATES


def test_nothing_is_said_where_they_are_zero(tmp_path: Path):
    pairs = [("the old apple", "apple"), ("one new saw", "saw")] * 20
    data = write_rows(tmp_path / "pairs.csv", pairs, ("source", "target"))
    folder = written("bart", tmp_path / "bart", dict.fromkeys(RATES, 0.0))
    keys = {"data.train": str(data), "model.pretrained": str(folder)}
    recorder = Recorder()
    plan = plan_run(build_config(overrides=keys), recorder)
    assert not plan.architecture.unused
    assert not [note for note in recorder.notes if "not used in training" in note]


def test_what_is_no_rate_is_damaged(tmp_path: Path):
    folder = written("bart", tmp_path / "bart", {"activation_dropout": "much"})
    with pytest.raises(DamagedError, match=r"config\.json: a value is of the wrong kind"):
        config_of(folder, head="language_modelling")
