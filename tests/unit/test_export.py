"""What is exported is what was trained, and other programs read it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import hasten
from builders import TINY, VOCAB, pack, random_sequences, small_model, write_labelled
from hasten.config.load import build_config
from hasten.core.errors import UsageError
from hasten.model.adapters import AdapterSettings, add_adapters, merge_adapters
from hasten.model.config import TransformerConfig
from hasten.model.heads import TokenOutputs
from hasten.model.pretrained.reading import load_pretrained
from hasten.model.pretrained.writing import family_for, save_pretrained
from hasten.plan.portable import choose_portable, portable_options
from hasten.training.adapter_files import save_adapter
from hasten.training.card import model_card
from hasten.training.export import export_run
from hasten.training.run import Run
from pretrained_folders import write_text_model

transformers = pytest.importorskip("transformers")

BERT: dict[str, Any] = {
    "norm_placement": "post",
    "positions": "learned",
    "num_token_types": 2,
    "pooling": "first",
    "head_activation": "tanh",
}
MODERN: dict[str, Any] = {
    "bias": False,
    "activation": "geglu",
    "embedding_norm": True,
    "first_norm": False,
    "head_activation": "gelu",
    "head_norm": True,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    data = write_labelled(folder / "train.csv", 60)
    test = write_labelled(folder / "test.csv", 12, seed=1)
    settings = {**TINY, "train.epochs": 1, "model.num_layers": 1, "eval.baseline": True}
    return {
        name: hasten.train(
            data,
            test=test,
            output=folder / str(name),
            preset=preset,
            settings={k: v for k, v in settings.items() if preset is None or k != "model.pooling"},
        )
        for name, preset in {"own": None, "portable": "portable"}.items()
    }


def scores_there(folder: Path, sequences: list[torch.Tensor]) -> torch.Tensor:
    """What transformers gives, one sequence at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return torch.cat([model(input_ids=row[None]).logits for row in sequences])


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_a_portable_run_is_what_transformers_loads(runs: dict[str, Run], tmp_path: Path):
    run = runs["portable"]
    done = export_run(run.folder, "huggingface", tmp_path / "out")
    assert set(done.files) >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert "hasten.json" not in done.files
    sequences = random_sequences([5, 1, 9])
    with torch.inference_mode():
        expected = run.saved.model(pack(sequences))
    for folder in (tmp_path / "out", run.folder / "model"):
        assert_close(scores_there(folder, sequences), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    labels = run.task.labels  # pyright: ignore[reportAttributeAccessIssue]
    assert config["id2label"] == {str(i): label for i, label in enumerate(labels)}


def test_a_model_folder_in_their_layout_reads_back_to_the_bit(runs: dict[str, Run]):
    run = runs["portable"]
    content = json.loads((run.folder / "model" / "hasten.json").read_text())
    assert content["format_version"] == 3 and content["family"] == "ModernBERT"
    there = load_file(run.folder / "model" / "model.safetensors")
    assert "model.layers.0.attn.Wqkv.weight" in there
    weights = run.saved.model.state_dict()
    assert torch.equal(
        there["model.embeddings.tok_embeddings.weight"], weights["embedding.tokens.weight"]
    )
    again = run.evaluate(run.folder.parent / "test.csv")
    assert again["loss"] == pytest.approx(run.result["test"]["loss"], rel=1e-6)


def test_what_no_class_has_is_refused_by_name(runs: dict[str, Run], tmp_path: Path):
    content = json.loads((runs["own"].folder / "model" / "config.json").read_text())
    assert content["model_type"] == "hasten"
    with pytest.raises(UsageError, match=r"model\.norm 'rmsnorm'.*--preset portable"):
        export_run(runs["own"].folder, "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("architecture", "head", "name"),
    [
        ("encoder", "classification", "ModernBERT"),
        ("encoder", "span", "ModernBERT"),
        ("decoder", "language_modelling", "Llama"),
        ("encoder_decoder", "language_modelling", "mBART"),
    ],
)
def test_every_portable_model_has_its_class(architecture: Any, head: Any, name: str):
    uses = {"pooling"} if head == "classification" else ()
    config, _ = choose_portable(build_config(preset="portable"), architecture, uses)
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    options = {n: v for n, v in config.model.model_dump().items() if n in known and v != "auto"}
    sizes = {"vocab_size": 30, "num_layers": 2, "hidden_size": 32, "num_heads": 4}
    found = TransformerConfig(
        **{**options, **sizes, **portable_options(architecture, head)},
        architecture=architecture,
        head=head,
    )
    assert family_for(found).name.startswith(name)


def test_a_portable_generator_is_what_transformers_loads(tmp_path: Path):
    (tmp_path / "t.txt").write_text(
        "one small red bird was near the old saw and the new plum\n" * 60
    )
    settings = {**TINY, "train.epochs": 1, "tokenizer.max_length": 32}
    del settings["model.pooling"]
    run = hasten.train(
        tmp_path / "t.txt", output=tmp_path / "run", preset="portable", settings=settings
    )
    export_run(run.folder, "huggingface", tmp_path / "out")
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    sequences = random_sequences([5, 1, 9])
    with torch.inference_mode():
        found = torch.cat([there(input_ids=row[None]).logits[0] for row in sequences])
        outputs = run.saved.model(pack(sequences))
        assert isinstance(outputs, TokenOutputs)
        assert_close(found, outputs.scores())


def test_a_portable_model_with_an_option_that_none_has_is_refused(tmp_path: Path):
    data = write_labelled(tmp_path / "train.csv", 60)
    with pytest.raises(UsageError, match=r"model\.portable: .*model\.qk_norm"):
        hasten.train(
            data,
            output=tmp_path / "run",
            preset="portable",
            settings={**TINY, "model.qk_norm": True},
        )
    assert not (tmp_path / "run").exists()


def test_the_card_says_what_was_measured(runs: dict[str, Run], tmp_path: Path):
    run = runs["portable"]
    export_run(run.folder, "huggingface", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["pipeline_tag"] == "text-classification" and "language" not in values
    (entry,) = values["model-index"][0]["results"]
    found = {metric["name"]: metric["value"] for metric in entry["metrics"]}
    assert entry["dataset"]["split"] == "test"
    assert found["accuracy"] == pytest.approx(run.result["test"]["accuracy"], abs=1e-6)
    assert f"| {run.result['baselines']['majority']['accuracy']:.4f} |" in body
    code = body.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "out"))
    known: dict[str, Any] = {}
    exec(code, known)
    assert len(code.strip().splitlines()) == 3 and known["model"].num_labels == 3


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("owner/some-bert", "owner/some-bert"),
        ("/home/someone/models/some-bert", "some-bert"),
        ("./some-bert", "some-bert"),
        ("models/of/some-bert", "some-bert"),
    ],
)
def test_the_card_names_a_base_that_others_can_find(base: str, shown: str):
    config = build_config(overrides={"model.pretrained": base, "task": "text-classification"})
    text = model_card("x", config, small_model(**BERT).config, {}, {})
    front = yaml.safe_load(text.split("---\n")[1])
    assert front.get("base_model") == (base if base == shown else None)
    assert f"beginning with the weights of `{shown}`" in text


@pytest.mark.parametrize("source_vocab_size", [None, 50])
def test_the_card_says_what_a_tokenizer_of_two_is(source_vocab_size: int | None):
    config = build_config(overrides={"task": "translation"})
    options = {"architecture": "encoder_decoder", "head": "language_modelling"}
    architecture = small_model(**options, source_vocab_size=source_vocab_size).config
    text = model_card("x", config, architecture, {}, {})
    is_told = "AutoTokenizer loads that of the source alone" in text.split("## Limits")[1]
    assert is_told == (source_vocab_size is not None)


def test_where_nothing_can_be_exported(runs: dict[str, Run], tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export_run(runs["own"].folder, "onnx", tmp_path / "taken")
    with pytest.raises(UsageError, match="Did you mean 'onnx'"):
        export_run(runs["own"].folder, "onxx")
    with pytest.raises(UsageError, match="no such run"):
        export_run(tmp_path / "gone", "onnx")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("options", [BERT, MODERN], ids=["BERT", "ModernBERT"])
@pytest.mark.parametrize("targets", [("query", "value"), ("key", "output", "up", "gate", "down")])
def test_peft_loads_the_adapter_on_the_base(
    kind: Any, options: dict[str, Any], targets: tuple[str, ...], tmp_path: Path
):
    peft = pytest.importorskip("peft")
    config = small_model(**options).config
    base = tmp_path / "base"
    base.mkdir()
    labels = {"pad_token_id": None, "id2label": {str(i): str(i) for i in range(3)}}
    save_pretrained(base, config, small_model(**options).state_dict(), labels)
    model = load_pretrained(base, head="classification", num_labels=3).model.eval()
    targets = tuple(name for name in targets if name != "gate" or config.is_gated)
    settings = AdapterSettings(kind, 3, 5.0, targets=targets)
    add_adapters(model, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = model.state_dict()
    family = family_for(config)
    save_adapter(tmp_path / "adapter", config, tensors, settings, str(base), family)
    there = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    there = peft.PeftModel.from_pretrained(there, tmp_path / "adapter").eval()
    sequences = random_sequences([5, 1, 9])
    with torch.inference_mode():
        found = torch.cat([there(input_ids=row[None]).logits for row in sequences])
        expected = model(pack(sequences))
    assert_close(found, expected)
    merged = small_model(**options)
    merged.load_state_dict(merge_adapters(tensors, settings.scale))
    with torch.inference_mode():
        assert_close(merged(pack(sequences)), expected)


def electra(folder: Path) -> Path:
    """ELECTRA of one width, whose options BERT's class for answers has too."""
    sizes = {"vocab_size": VOCAB, "embedding_size": 32, "hidden_size": 32, "num_hidden_layers": 2}
    config = transformers.ElectraConfig(
        **sizes, num_attention_heads=2, intermediate_size=48, initializer_range=0.3
    )
    transformers.ElectraForQuestionAnswering(config).save_pretrained(folder)
    return folder


BASES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "electra": ("AutoModelForQuestionAnswering", "span", ("query", "value", "down")),
    "gpt2": ("AutoModelForCausalLM", "language_modelling", ("query", "key", "output", "down")),
    "t5": ("AutoModelForSeq2SeqLM", "language_modelling", ("query", "value", "up")),
    "bart": ("AutoModelForSeq2SeqLM", "language_modelling", ("key", "output", "down")),
}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", BASES)
def test_peft_loads_the_adapter_of_every_kind_of_base(kind: Any, name: str, tmp_path: Path):
    peft = pytest.importorskip("peft")
    class_name, head, targets = BASES[name]
    torch.manual_seed(0)
    base = tmp_path / "base"
    base = electra(base) if name == "electra" else write_text_model(base, name)
    loaded = load_pretrained(base, head=head)
    model, settings = loaded.model.eval(), AdapterSettings(kind, 3, 5.0, targets=targets)
    add_adapters(model, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tensors, folder = model.state_dict(), tmp_path / "adapter"
    save_adapter(folder, model.config, tensors, settings, str(base), loaded.family)
    there = getattr(transformers, class_name).from_pretrained(base)
    there = peft.PeftModel.from_pretrained(there, folder).eval()
    sequences, sources = random_sequences([5, 1, 9]), random_sequences([3, 6, 2], seed=1)
    reads_source = model.config.architecture == "encoder_decoder"
    batch = pack(sequences, sources=sources if reads_source else None)
    found = []
    with torch.inference_mode():
        for row, source in zip(sequences, sources, strict=True):
            given = {"input_ids": row[None]}
            if reads_source:
                given = {"input_ids": source[None], "decoder_input_ids": row[None]}
            out = there(**given)
            if head == "span":
                found.append(torch.stack([out.start_logits[0], out.end_logits[0]], dim=-1))
            else:
                found.append(out.logits[0])
        outputs = model(batch)
        expected = outputs.scores() if isinstance(outputs, TokenOutputs) else outputs
    assert_close(torch.cat(found), expected)


def test_the_configurations_above_are_of_the_families_they_are_called_after():
    found = [family_for(small_model(**options).config) for options in (BERT, MODERN)]
    assert [family.name for family in found] == ["BERT", "ModernBERT"]
