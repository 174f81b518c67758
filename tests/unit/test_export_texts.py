"""From text to prediction in transformers: exported folders encode, score and write as we do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from builders import TINY, WORDS, Recorder, labelled_rows, write_labelled, write_rows
from hasten.config.load import build_config
from hasten.data.tokens import encode_texts
from hasten.training.export import export_run
from hasten.training.run import Run
from hasten.training.session import start_run
from pretrained_folders import END, write_bert, write_text_model

transformers = pytest.importorskip("transformers")

THINGS = (*WORDS["fruit"], *WORDS["tool"])
PAIRS = [(f"the {word} and one", word) for word in THINGS] * 6
SETTINGS: dict[str, Any] = {
    **{name: value for name, value in TINY.items() if name != "model.pooling"},
    "train.epochs": 20,
    "train.tokens_per_step": 100,
    "train.learning_rate": 1e-2,
    "train.precision": "float32",
    "train.matrix_library": "default",
}
OF_THE_MODEL = ("model.num_layers", "model.hidden_size", "model.num_heads")


def learned(data: Path, folder: Path, begun: Path | None, **settings: Any) -> Run:
    """A run on all rows of a file, from a portable model of our own or from a pretrained one."""
    wanted = {**SETTINGS, "data.train": str(data), "data.validation": str(data), **settings}
    if begun is not None:
        wanted = {key: value for key, value in wanted.items() if key not in OF_THE_MODEL}
        wanted["model.pretrained"] = str(begun)
    preset = "portable" if begun is None else None
    start_run(build_config(preset=preset, overrides=wanted), folder / "run", Recorder())
    export_run(folder / "run", "huggingface", folder / "out")
    return Run(folder / "run")


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_classifier_is_used_from_text(pretrained: bool, tmp_path: Path):
    begun = write_bert(tmp_path / "bert", initializer_range=0.1) if pretrained else None
    data = write_labelled(tmp_path / "train.csv", 60)
    run = learned(data, tmp_path, begun, **{"train.epochs": 3})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    texts = ["one Old hammer", "the swift", "café, 東京?"]
    found = run.predict(texts)
    with torch.inference_mode():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        scores = model(**batch).logits.softmax(-1)
    labels = [model.config.id2label[i] for i in range(3)]
    for row, prediction in zip(scores.tolist(), found, strict=True):
        expected = [prediction["probabilities"][label] for label in labels]
        assert row == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pretrained", [False, True])
def test_pairs_are_encoded_alike(pretrained: bool, tmp_path: Path):
    # A portable model of our own joins texts, since its class has no segments.
    rows = [(text, text.split()[0], label) for text, label in labelled_rows(60)]
    data = write_rows(tmp_path / "train.csv", rows, ("first", "second", "label"))
    begun = write_bert(tmp_path / "bert") if pretrained else None
    settings = {"train.epochs": 1, "data.text_columns": "first,second"}
    if pretrained:
        run = learned(data, tmp_path, begun, **settings)
    else:
        wanted = {**SETTINGS, **settings, "data.train": str(data)}
        start_run(build_config(overrides=wanted), tmp_path / "run", Recorder())
        run = Run(tmp_path / "run")
    folder = run.folder / "model"
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    task = run.saved.task
    (ours,) = encode_texts(task.tokenizers[0], [("one old", "hammer")], task.form)
    theirs = tokenizer("one old", "hammer")
    assert theirs.input_ids == ours.token_ids
    assert theirs.token_type_ids == ours.token_types and max(ours.token_types) == 1


@pytest.mark.parametrize("pretrained", [False, True])
def test_answers_are_found_from_text(pretrained: bool, tmp_path: Path):
    rows = [
        (f"{text} and the {word}", f"one {word}", word)
        for (text, _), word in zip(labelled_rows(60), WORDS["bird"] * 8, strict=False)
    ]
    data = write_rows(tmp_path / "q.csv", rows, ("context", "question", "answer"))
    begun = write_bert(tmp_path / "bert", initializer_range=0.1) if pretrained else None
    run = learned(data, tmp_path, begun, **{"train.epochs": 2, "tokenizer.max_length": 64})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    context, question = "one red owl near the new saw", "one owl"
    (found,) = run.predict([(context, question)])
    encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    places = encoded.pop("offset_mapping")[0].tolist()
    allowed = torch.tensor([i == 1 for i in encoded.sequence_ids(0)])
    with torch.inference_mode():
        output = model(**encoded)
    chosen = allowed.clone()
    chosen[0] = True
    sides = [
        scores[0].masked_fill(~chosen, -torch.inf).log_softmax(-1)
        for scores in (output.start_logits, output.end_logits)
    ]
    limit = run.saved.task.rules.max_tokens
    best = max(
        (float(sides[0][i] + sides[1][j]), places[i][0], places[j][1])
        for i in range(len(places))
        for j in range(i, min(len(places), i + limit))
        if allowed[i] and allowed[j]
    )
    assert found["score"] == pytest.approx(torch.tensor(best[0]).exp().item(), rel=1e-3)
    assert found["answer"] == context[best[1] : best[2]].strip()


@pytest.mark.parametrize("kind", [None, "llama", "gpt2"])
def test_a_prompt_is_continued_from_text(kind: str | None, tmp_path: Path):
    data = write_rows(tmp_path / "d.csv", PAIRS, ("prompt", "response"))
    begun = None if kind is None else write_text_model(tmp_path / kind, kind)
    run = learned(data, tmp_path, begun)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for word in ("plum", "saw"):
        text = f"the {word} and one"
        ids = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            written = model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
        assert written[-1] == model.generation_config.eos_token_id
        found = tokenizer.decode(written[ids.input_ids.shape[1] :], skip_special_tokens=True)
        expected = run.predict([text])[0]["generated"]
        assert found.strip() == expected.strip() and expected.strip() in THINGS


@pytest.mark.parametrize("kind", [None, "t5", "bart", "marian", "m2m_100"])
def test_a_translation_is_written_from_text(kind: str | None, tmp_path: Path):
    data = write_rows(tmp_path / "d.csv", PAIRS, ("source", "target"))
    begun = None if kind is None else write_text_model(tmp_path / kind, kind)
    settings: dict[str, Any] = {"train.epochs": 30, "eval.num_beams": 1}
    if kind == "m2m_100":
        settings |= {"tokenizer.source_language": "de", "tokenizer.target_language": "__en__"}
    run = learned(data, tmp_path, begun, **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    for word in ("plum", "saw"):
        text = f"the {word} and one"
        ids = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            written = model.generate(**ids, max_new_tokens=20, do_sample=False, num_beams=1)[0]
        found = tokenizer.decode(written, skip_special_tokens=True)
        expected = run.predict([text])[0]["translation"]
        assert found.strip() == expected and expected in THINGS


# What a folder says of generation, where transformers finds it: num_beams are not of the run.
GENERATION: dict[str, Any] = {
    "num_beams": 3,
    "length_penalty": 0.7,
    "no_repeat_ngram_size": 2,
    "max_length": 33,
    "min_length": 2,
    "early_stopping": True,
    "repetition_penalty": 1.1,
    "bad_words_ids": [[7], [8, 9]],
}


def generation_of(folder: Path, kind: str) -> dict[str, Any]:
    """What transformers generates with, the file's own history left out."""
    found = getattr(transformers, kind).from_pretrained(folder).generation_config.to_diff_dict()
    return {k: v for k, v in found.items() if not k.startswith("_") and "version" not in k}


@pytest.mark.parametrize("place", ["config.json", "generation_config.json", "both"])
def test_settings_of_generation_are_kept(place: str, tmp_path: Path):
    begun = write_text_model(tmp_path / "bart", "bart")
    config, generation = begun / "config.json", begun / "generation_config.json"
    said = json.loads(generation.read_text())
    if place == "config.json":
        generation.unlink()
    else:
        generation.write_text(json.dumps({**said, **GENERATION, "_from_model_config": True}))
    if place != "generation_config.json":  # of which the other file, where there is one, wins
        changed = {} if place == "config.json" else {"num_beams": 5, "top_k": 7}
        config.write_text(json.dumps({**json.loads(config.read_text()), **GENERATION, **changed}))
    expected = generation_of(begun, "BartForConditionalGeneration")
    assert expected.items() >= GENERATION.items()
    data = write_rows(tmp_path / "d.csv", PAIRS, ("source", "target"))
    run = learned(data, tmp_path, begun, **{"train.epochs": 1})
    for folder in (tmp_path / "out", run.folder / "model"):
        found = generation_of(folder, "BartForConditionalGeneration")
        assert {key: found.get(key) for key in expected} == expected
        assert found.keys() - expected.keys() <= {"forced_bos_token_id"}
        assert not json.loads((folder / "config.json").read_text()).keys() & GENERATION.keys()
        written = json.loads((folder / "generation_config.json").read_text())
        assert "_from_model_config" not in written  # else config.json would be asked again


def test_every_end_of_a_text_is_kept(tmp_path: Path):
    begun = write_text_model(tmp_path / "llama", "llama")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((begun / name).read_text())
        (begun / name).write_text(json.dumps({**content, "eos_token_id": [9, END, 7]}))
    data = write_rows(tmp_path / "d.csv", PAIRS, ("prompt", "response"))
    learned(data, tmp_path, begun, **{"train.epochs": 1})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [END, 9, 7] == model.config.eos_token_id


def test_the_three_lines_of_a_card_of_a_run_from_scratch_work(tmp_path: Path):
    data = write_labelled(tmp_path / "train.csv", 60)
    settings = {**SETTINGS, "train.epochs": 1}
    run = hasten.train(data, output=tmp_path / "run", preset="portable", settings=settings)
    export_run(run.folder, "huggingface", tmp_path / "out")
    use = transformers.pipeline("text-classification", model=str(tmp_path / "out"))
    (found,) = use("one old hammer")
    (expected,) = run.predict(["one old hammer"])
    assert found["label"] == expected["label"]
    assert found["score"] == pytest.approx(expected["probability"], rel=1e-4)
