"""A model whose folder has no tokenizer.json is trained, and exported with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import TINY, Recorder, write_rows
from hasten.config.load import build_config
from hasten.data.pretrained_tokenizer import read_tokenizers
from hasten.training.export import export_run
from hasten.training.run import Run
from hasten.training.session import start_run
from pretrained_folders import TEXT_MODELS
from sentencepiece_folders import LLAMA, T5_NUMBERS, train, write_json, write_m2m100, write_marian

transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

PAIRS = [("bako ritu", "tion 22."), ("über la", "ça ko"), ("ne ne ne", "shi")] * 8
OF_THE_MODEL = ("model.pooling", "model.num_layers", "model.hidden_size", "model.num_heads")
SPACES = {"t5": " ", "marian": " ", "m2m_100": " ", "llama": "  "}  # that two become
CODES = {"tokenizer.source_language": "de", "tokenizer.target_language": "en"}


def write_model(folder: Path, kind: str) -> None:
    folder.mkdir()
    if kind == "marian":
        write_marian(folder)
    elif kind == "m2m_100":
        write_m2m100(folder)
    else:
        file = "spiece.model" if kind == "t5" else "tokenizer.model"
        (folder / file).write_bytes(train(**(T5_NUMBERS if kind == "t5" else LLAMA)))
        write_json(folder / "config.json", {"model_type": kind})
        name = "T5Tokenizer" if kind == "t5" else "LlamaTokenizer"
        said = {"tokenizer_class": name, "add_bos_token": kind == "llama"}
        write_json(folder / "tokenizer_config.json", said)
    found = read_tokenizers(folder)
    config_class, model_class, sizes, _ = TEXT_MODELS[kind]
    ids = {f"{name}_token_id": found.token_id(f"{name}_token") for name in ("bos", "eos", "pad")}
    sizes = {**sizes, **{key: number for key, number in ids.items() if number is not None}}
    if "decoder_start_token_id" in sizes:
        sizes["decoder_start_token_id"] = ids["pad_token_id"]
    vocab_size = found.tokenizers[0].get_vocab_size() + 8
    config = getattr(transformers, config_class)(**sizes, vocab_size=vocab_size)
    torch.manual_seed(0)
    getattr(transformers, model_class)(config).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["t5", "marian", "m2m_100", "llama"])
def test_it_is_trained_and_exported(kind: str, tmp_path: Path):
    write_model(tmp_path / kind, kind)
    columns = ("prompt", "response") if kind == "llama" else ("source", "target")
    data = write_rows(tmp_path / "d.csv", PAIRS, columns)
    settings: dict[str, Any] = {k: v for k, v in TINY.items() if k not in OF_THE_MODEL}
    settings |= {"data.train": str(data), "data.validation": str(data), "train.epochs": 1}
    settings |= {"model.pretrained": str(tmp_path / kind), **(CODES if kind == "m2m_100" else {})}
    start_run(build_config(overrides=settings), tmp_path / "run", Recorder())
    export_run(tmp_path / "run", "huggingface", tmp_path / "out")
    run = Run(tmp_path / "run")

    begun = transformers.AutoTokenizer.from_pretrained(tmp_path / kind)
    if kind == "m2m_100":
        begun.src_lang = "de"
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("bako ritu", "über  la 22.", "ça 東京"):
        ids = exported(text).input_ids
        # Between a prompt and what a decoder writes is a line's end.
        line = run.saved.task.framing.read.last if kind == "llama" else ()
        assert ids == [*begun(text).input_ids, *line]
        if exported.unk_token_id not in ids:
            decoded = exported.decode(ids, skip_special_tokens=True)
            assert decoded.rstrip() == text.replace("  ", SPACES[kind])
    assert exported.eos_token == begun.eos_token == "</s>"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == exported.eos_token_id
    # The run folder is enough for itself.
    (written,) = run.predict(["bako ritu"])
    assert set(written) >= {"generated" if kind == "llama" else "translation"}
