"""Tokens around texts that the vocabulary has not: one clear error before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors

from builders import Recorder, write_labelled, write_rows
from hasten.config.load import build_config
from hasten.core.errors import DamagedError
from hasten.data.template import Template, read_template, with_template
from hasten.training.session import start_run
from pretrained_folders import write_bert, write_text_model

PAIRS = [("the old apple", "apple"), ("one new saw", "saw")] * 20
LANGUAGES = {"tokenizer.source_language": "de", "tokenizer.target_language": "en"}


def change(file: Path, **values: Any) -> None:
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def refused(folder: Path, tmp_path: Path, **settings: Any) -> str:
    """What a run says that must not begin."""
    data = write_rows(tmp_path / "pairs.csv", PAIRS, ("prompt", "response"))
    if (folder / "config.json").read_text().count("is_encoder_decoder"):
        data = write_rows(tmp_path / "pairs.csv", PAIRS, ("source", "target"))
    keys = {"data.train": str(data), "model.pretrained": str(folder), "train.epochs": 1}
    with pytest.raises(DamagedError) as found:
        start_run(build_config(overrides={**keys, **settings}), tmp_path / "run", Recorder())
    assert not (tmp_path / "run").exists() and "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("value", [-1, 10**6, 1 << 40, "2", 1.0, True])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_an_output_begins_with_is_a_token(value: Any, file: str, tmp_path: Path):
    folder = write_text_model(tmp_path / "t5", "t5")
    (folder / "generation_config.json").write_text("{}")
    change(folder / file, decoder_start_token_id=value)
    said = refused(folder, tmp_path)
    assert f"decoder_start_token_id is {value!r}, which is none of the " in said


def test_padding_that_an_output_begins_with_is_a_token(tmp_path: Path):
    folder = write_text_model(tmp_path / "t5", "t5")
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", decoder_start_token_id=..., pad_token_id=999)
    assert "pad_token_id is 999, which is none of the " in refused(folder, tmp_path)


@pytest.mark.parametrize(("kind", "settings"), [("gpt2", {}), ("m2m_100", LANGUAGES)])
@pytest.mark.parametrize("value", [999, [999, 2], "2"])
def test_what_ends_an_output_is_a_token(
    kind: str, settings: dict[str, str], value: Any, tmp_path: Path
):
    folder = write_text_model(tmp_path / kind, kind)
    (folder / "generation_config.json").unlink()
    change(folder / "tokenizer_config.json", eos_token=None, sep_token=None)
    change(folder / "config.json", eos_token_id=value)
    value = value[0] if isinstance(value, list) else value
    said = refused(folder, tmp_path, **settings)
    assert f"eos_token_id is {value!r}, which is none of the " in said


def test_what_ends_a_text_of_a_language_has_a_word_in_the_tokenizer(tmp_path: Path):
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    folder = write_text_model(tmp_path / "m2m", "m2m_100")
    (folder / "generation_config.json").unlink()
    change(folder / "tokenizer_config.json", eos_token=None, sep_token=None)
    content = json.loads((folder / "config.json").read_text())
    # An embedding may have more rows than the tokenizer has tokens.
    size = content["vocab_size"]
    config = M2M100Config(**{**content, "vocab_size": size + 8, "eos_token_id": size + 3})
    M2M100ForConditionalGeneration(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    said = refused(folder, tmp_path, **LANGUAGES)
    assert f"eos_token_id is {size + 3}, which is no token" in said


def test_what_a_post_processor_adds_are_tokens(tmp_path: Path):
    folder = write_bert(tmp_path / "bert")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 777))
    tokenizer.save(str(folder / "tokenizer.json"))
    data = write_labelled(tmp_path / "train.csv", 40)
    keys = {"data.train": str(data), "model.pretrained": str(folder)}
    with pytest.raises(
        DamagedError, match=r"bert: .*post-processor puts token 777 .* its vocabulary of"
    ):
        start_run(build_config(overrides=keys), tmp_path / "run", Recorder())
    assert not (tmp_path / "run").exists()
    with pytest.raises(DamagedError, match="puts token 777"):
        read_template(tokenizer)
    with pytest.raises(DamagedError, match="puts token 778"):
        with_template(tokenizer, Template((778,)))


def test_an_empty_vocabulary_is_refused(tmp_path: Path):
    folder = write_text_model(tmp_path / "llama", "llama")
    Tokenizer(models.WordLevel({}, "<unk>")).save(str(folder / "tokenizer.json"))
    assert "the tokenizer's vocabulary is empty" in refused(folder, tmp_path)
