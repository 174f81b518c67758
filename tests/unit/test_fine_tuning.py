"""A run that begins with a pretrained model: what the folder decides, and going on without it."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import Recorder, labelled_rows, write_labelled, write_rows
from hasten.config.load import build_config, config_to_yaml
from hasten.core.errors import DamagedError, MachineError, UsageError
from hasten.core.files import file_hash
from hasten.model.pretrained.reading import load_pretrained
from hasten.training.build import build_loop, plan_run
from hasten.training.run import Run
from hasten.training.saved import writable_as
from hasten.training.session import plan_only, resume_run, start_run
from pretrained_folders import SPECIAL, write_bert, write_tokenizer

transformers = pytest.importorskip("transformers")

SETTINGS: dict[str, Any] = {
    "train.epochs": 3,
    "train.tokens_per_step": 300,
    "train.learning_rate": 3e-3,
    "train.precision": "float32",
    "train.matrix_library": "default",
    "eval.baseline": False,
}
ADAPTED = {"finetune.adapter": "dora", "finetune.rank": 3, "finetune.adapter_dropout": 0.1}
FROZEN = {"finetune.freeze": "embedding,encoder.blocks.0", "finetune.layer_decay": 0.5}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("pretrained") / "bert", initializer_range=0.1)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("data") / "train.csv", 120)


@pytest.fixture
def config(bert: Path, data_file: Path):
    def make(**settings: Any):
        keys = {"data.train": str(data_file), "model.pretrained": str(bert)}
        return build_config(overrides={**keys, **SETTINGS, **settings})

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Run(run).saved.model.state_dict()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_begins_with_the_weights_of_the_folder(config, bert: Path, tmp_path: Path):
    recorder = Recorder()
    plan = plan_run(config(), recorder)
    model = build_loop(plan, tmp_path, recorder).parts.model
    for name, tensor in load_pretrained(bert, head="classification").model.state_dict().items():
        if not name.startswith("head.classifier"):
            assert torch.equal(model.get_parameter(name), tensor), name
    assert model.config == plan.architecture and model.config.num_labels == 3
    text = "\n".join(recorder.notes)
    assert "new, drawn at random: head.classifier.weight, head.classifier.bias" in text
    again = build_loop(plan, tmp_path, recorder).parts.model
    other = build_loop(plan_run(config(**{"train.seed": 1}), recorder), tmp_path, recorder)
    assert torch.equal(again.head.classifier.weight, model.head.classifier.weight)
    assert not torch.equal(other.parts.model.head.classifier.weight, model.head.classifier.weight)


def test_a_run_learns_and_is_used_without_the_folder(config, bert: Path, tmp_path: Path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    settings = {
        "model.pretrained": str(folder),
        "model.pooling": "mean",
        "train.epochs": 12,
        "train.tokens_per_step": 100,
        "train.learning_rate": 5e-3,
        "data.test": config().data.train,
    }
    result = start_run(config(**settings), tmp_path / "run", Recorder())
    assert result["test"]["accuracy"] > 0.9
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["pretrained"]["name"] == str(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        data["pretrained"]["sha256"]
    )
    shutil.rmtree(folder)
    run = Run(tmp_path / "run")
    assert run.predict("one old hammer")[0]["label"] == "tool"
    assert not (tmp_path / "run" / "start.safetensors").exists()


# What the folder decides


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.num_layers", 3, r"model\.num_layers is 2 in .*leave out 3"),
        ("model.norm", "rmsnorm", r"model\.norm is layernorm in "),  # our default
        ("model.positions", "rotary", r"model\.positions is learned in "),
        ("tokenizer.kind", "bpe", r"tokenizer\.kind: .* has a tokenizer.*leave out bpe"),
        ("tokenizer.vocab_size", 100, r"tokenizer\.vocab_size: "),
        ("tokenizer.lowercase", True, r"tokenizer\.lowercase: "),
        ("tokenizer.path", "x.json", r"tokenizer\.path: "),
        ("tokenizer.max_length", 65, r"tokenizer\.max_length 65: .* takes 64 tokens at most"),
        ("task", "text-generation", r"is an encoder, which cannot learn text-generation; it can "
         r"learn text-classification or question-answering"),
    ],
)  # fmt: skip
def test_what_the_folder_decides_cannot_be_set(config, key: str, value: Any, said: str):
    with pytest.raises(UsageError, match=said):
        plan_run(config(**{key: value}), Recorder())


def test_what_agrees_with_the_folder_or_changes_no_weight_may_be_set(config):
    free = {
        "model.dropout": 0.3,
        "model.attention_dropout": 0.2,
        "model.token_dropout": 0.1,
        "model.head_dropout": 0.4,
        "model.stochastic_depth": 0.1,
        "model.initializer_std": 0.5,
        "model.pooling": "mean",
        "model.num_layers": 2,
        "model.norm": "layernorm",
        "tokenizer.max_length": 20,
    }
    found = plan_run(config(**free), Recorder()).architecture
    for key, value in free.items():
        if key.startswith("model."):
            assert getattr(found, key.removeprefix("model.")) == value
    plain = plan_run(config(), Recorder())
    assert plain.architecture.dropout == 0.05 and plain.architecture.attention_dropout == 0.0
    once = plan_run(config(**{"train.epochs": 1}), Recorder())
    assert once.architecture.dropout == 0.0 == once.architecture.head_dropout
    assert plain.config.tokenizer.max_length == 64 == plain.architecture.max_positions


def test_attention_pooling_is_drawn(config, tmp_path: Path):
    recorder = Recorder()
    plan = plan_run(config(**{"model.pooling": "attention"}), recorder)
    scorer = build_loop(plan, tmp_path, recorder).parts.model.head.scorer
    assert 0.05 < scorer.weight.std() < 0.2 and not scorer.bias.any()
    assert "head.scorer.weight" in "\n".join(recorder.notes)


def test_the_plan_of_a_plan_is_itself(config, tmp_path: Path):
    plan = plan_run(config(**ADAPTED), Recorder())
    assert '"auto"' not in json.dumps(plan.config.model_dump())
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(plan.config))
    again = plan_run(build_config(file=file), Recorder())
    assert again.config == plan.config and again.architecture == plan.architecture
    # Of what is handed on to other processes, nobody has set more than a person has.
    file.write_text(config_to_yaml(config(), only_given=True))
    assert (
        plan_run(build_config(file=file), Recorder()).config
        == plan_run(config(), Recorder()).config
    )


def test_fine_tuning_chooses_otherwise_than_from_scratch(config, data_file: Path):
    recorder = Recorder()
    tuned = plan_run(config(), recorder)
    scratch = plan_run(build_config(overrides={"data.train": str(data_file)}), Recorder())
    reasons = {choice.key: choice.reason for choice in tuned.choices}
    for key in ("optim.schedule", "train.ema_decay", "optim.betas", "optim.weight_decay"):
        section, _, name = key.partition(".")
        one, other = (getattr(getattr(p.config, section), name) for p in (tuned, scratch))
        assert one != other and reasons[key], key
    # What a person has set stays, also where the setting has a default.
    kept = plan_run(config(**{"optim.schedule": "constant"}), Recorder()).config
    assert kept.optim.schedule == "constant" and kept.train.ema_decay > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"finetune.adapter": "lora"},
        {"finetune.freeze": "embedding"},
        {"finetune.layer_decay": 0.9},
        {"tokenizer.add_tokens": "<x>"},
        {"tokenizer.kind": "pretrained"},
    ],
)
def test_settings_of_a_pretrained_model_need_one(settings: dict[str, Any], data_file: Path):
    key = next(iter(settings))
    with pytest.raises(UsageError, match=f"{key}.*--model"):
        plan_run(build_config(overrides={"data.train": str(data_file), **settings}), Recorder())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parallel.layout": "tensor=2", **ADAPTED}, "tensor above 1"),
        ({"parallel.layout": "pipeline=2", **FROZEN}, "pipeline above 1"),
        ({**ADAPTED, "finetune.freeze": "embedding"}, "leave out finetune.freeze"),
        ({**ADAPTED, "tokenizer.add_tokens": "<x>"}, "new tokens"),
        ({"finetune.freeze": "encoder.block.1"}, "'encoder.block.1' names no weight"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: dict[str, Any], said: str, config, tmp_path: Path
):
    with pytest.raises(UsageError, match=said):
        plan_only(config(**settings), tmp_path / "run", Recorder())


# Going on


class _Stopped(Exception):
    """What ends a run at once, like a power cut."""


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.training import loop

    run_step = loop.run_step

    def stopping(parts: Any, split: Any, examples: Any, number: int, *rest: Any) -> Any:
        if number == step:
            raise _Stopped
        return run_step(parts, split, examples, number, *rest)

    monkeypatch.setattr(loop, "run_step", stopping)


@pytest.mark.parametrize("settings", [{}, ADAPTED, FROZEN, {"finetune.adapter": "lora"}])
@pytest.mark.parametrize("step", [0, 3, 9])
def test_a_run_goes_on_exactly_without_the_folder(
    settings: dict[str, Any], step: int, config, bert: Path, tmp_path: Path, monkeypatch
):
    start_run(config(**settings), tmp_path / "whole", Recorder())
    folder, run = shutil.copytree(bert, tmp_path / "bert"), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(_Stopped):
            start_run(config(**settings, **{"model.pretrained": str(folder)}), run, Recorder())
    assert (run / "start.safetensors").exists()
    shutil.rmtree(folder)
    resume_run(run, Recorder())
    assert_same(weights(run), weights(tmp_path / "whole"))
    assert not (run / "start.safetensors").exists()
    file = run / "architecture.json"
    file.write_text(file.read_text()[:-30])
    with pytest.raises(DamagedError, match=r"architecture\.json: does not describe a model"):
        resume_run(run, Recorder())


def test_adapters_are_saved_merged(config, bert: Path, tmp_path: Path):
    settings = {**ADAPTED, "data.test": config().data.train}
    result = start_run(config(**settings), tmp_path / "run", Recorder())
    found = Run(tmp_path / "run")
    plan = plan_run(config(), Recorder())
    assert found.saved.model.config == plan.architecture
    measured = found.evaluate(config().data.train[0])
    assert measured["loss"] == pytest.approx(result["test"]["loss"], rel=1e-5)
    counted = sum(p.numel() for p in found.saved.model.parameters())
    assert result["training"]["num_parameters"] == counted
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert result["training"]["num_trained"] == sum(t.numel() for t in adapter.values()) < counted
    plain = load_pretrained(bert, head="classification").model
    name = "encoder.blocks.1.attention.query.weight"
    assert not torch.equal(weights(tmp_path / "run")[name], plain.get_parameter(name))
    assert torch.equal(
        weights(tmp_path / "run")["embedding.tokens.weight"],
        plain.get_parameter("embedding.tokens.weight"),
    )


# More tokens, and bad folders


def test_new_tokens_are_whole_and_learned(config, tmp_path: Path):
    recorder = Recorder()
    plan = plan_run(config(**{"tokenizer.add_tokens": "zyx,hammer,one two"}), recorder)
    tokenizer = plan.data.task.tokenizers[0]
    assert tokenizer.encode("old zyx one two", add_special_tokens=False).tokens == [
        "old",
        "zyx",
        "one two",
    ]
    size = plan_run(config(), Recorder()).architecture.vocab_size
    assert plan.architecture.vocab_size == size + 2  # hammer is one already
    assert "2 of them new" in "\n".join(recorder.notes)
    start_run(config(**{"tokenizer.add_tokens": "zyx,one two"}), tmp_path / "run", Recorder())
    assert len(weights(tmp_path / "run")["embedding.tokens.weight"]) == size + 2
    Run(tmp_path / "run").predict("zyx one two")


def test_a_tokenizer_larger_than_the_embedding_is_refused(config, bert: Path, tmp_path: Path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    words = (folder / "vocab.txt").read_text().split()
    write_tokenizer(folder, [*SPECIAL, *[w for w in words if w not in SPECIAL], "more", "still"])
    with pytest.raises(DamagedError, match=f"of {len(words) + 2} tokens exceeds the {len(words)} "):
        plan_run(config(**{"model.pretrained": str(folder)}), Recorder())


@pytest.mark.parametrize(
    "name", ["nowhere", "./owner/name", "a/b/c", "C:\\models", "a b/c", "../x/y"]
)
def test_what_is_neither_folder_nor_id_is_refused(name: str, config):
    with pytest.raises(UsageError, match=r"no such folder.*owner/name"):
        plan_run(config(**{"model.pretrained": name}), Recorder())


def test_an_id_needs_the_hub(config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'hasten\[hub\]'"):
        plan_run(config(**{"model.pretrained": "owner/name"}), Recorder())


def test_an_id_is_fetched(config, bert: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "owner/none":
            raise OSError("401 Client Error\nmore about it")
        return str(bert)

    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", fetch, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    plan = plan_run(config(**{"model.pretrained": "owner/name"}), Recorder())
    assert plan.pretrained is not None and plan.pretrained.folder == bert
    [(name, patterns)] = asked
    assert name == "owner/name" and not any("bin" in p or "py" in p for p in patterns)
    with pytest.raises(MachineError, match=r"owner/none: .*cannot be fetched.*401 Client Error$"):
        plan_run(config(**{"model.pretrained": "owner/none"}), Recorder())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_an_id_of_pickles_is_refused_with_what_to_do(
    name: str, config, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = shutil.copytree(bert, tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    files = ["config.json", name, "tokenizer.json"]
    hub = types.ModuleType("huggingface_hub")
    options = {"raising": False}
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(folder), **options)
    monkeypatch.setattr(hub, "list_repo_files", lambda _: files, **options)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(UsageError) as caught:
        plan_run(config(**{"model.pretrained": "owner/some-name"}), Recorder())
    first, second = str(caught.value).splitlines()
    assert first.startswith("model.pretrained owner/some-name: its weights are pickle")
    assert "--model some-name" in first
    assert second == (
        "hf download owner/some-name --local-dir some-name && hasten convert some-name"
    )
    files[1] = "tf_model.h5"
    with pytest.raises(DamagedError, match=r"there is no model\.safetensors"):
        start_run(config(**{"model.pretrained": "owner/some-name"}), tmp_path / "run", Recorder())


def test_all_that_is_missing_or_unexpected_is_in_the_run_folder(config, bert: Path, tmp_path: Path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    more = {f"another.{i}.weight": torch.zeros(2) for i in range(6)}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    recorder = Recorder()
    settings = {"model.pretrained": str(folder), "model.pooling": "attention", "train.epochs": 1}
    start_run(config(**settings), tmp_path / "run", recorder)
    said = json.loads((tmp_path / "run" / "data.json").read_text())["pretrained"]
    parts = ("classifier", "scorer")
    assert said["missing"] == [f"head.{p}.{kind}" for p in parts for kind in ("weight", "bias")]
    assert said["unexpected"] == sorted(more)
    (note,) = [note for note in recorder.notes if "of no use here" in note]
    assert note.endswith("another.3.weight and 2 more (all are in data.json of the run)")
    # Files of one name in two folders are two files.
    hashes = said["sha256"]
    assert {"config.json", "1_Pooling/config.json"} <= hashes.keys()
    for name in hashes:
        assert hashes[name] == file_hash(folder / name)


def test_a_model_of_sentences_pools_as_it_says(config, bert: Path, tmp_path: Path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    said = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False}
    for mode, pooling in (("mean_tokens", "mean"), ("cls_token", "first"), ("lasttoken", "last")):
        content = json.dumps({**said, f"pooling_mode_{mode}": True})
        (folder / "1_Pooling" / "config.json").write_text(content)
        plan = plan_run(config(**{"model.pretrained": str(folder)}), Recorder())
        assert plan.architecture.pooling == pooling
        own_head = "tanh" if mode == "cls_token" else "none"
        assert plan.architecture.head_activation == own_head
    # What transformers' class does, so that it can be exported.
    kept = plan_run(
        config(**{"model.pretrained": str(folder), "model.pooling": "first"}), Recorder()
    )
    assert kept.architecture.pooling == "first" and writable_as(kept.architecture) is not None


def test_an_embedding_that_is_seen_too_seldom_stays_as_it_is(config, bert: Path, tmp_path: Path):
    recorder = Recorder()
    tuned = plan_run(config(), recorder)
    rows = tuned.architecture.vocab_size
    tokens = int(tuned.data.splits["train"].lengths.sum())
    for epochs, frozen in ((19 * rows / tokens, ("embedding",)), (21 * rows / tokens, ())):
        plan = plan_run(config(**{"train.epochs": epochs}), recorder)
        assert plan.config.finetune.freeze == frozen
        model = build_loop(plan, tmp_path, recorder).parts.model
        assert model.embedding.tokens.weight.requires_grad == (not frozen)
        assert model.embedding.token_types.weight.requires_grad == (not frozen)
        assert model.encoder.positions.weight.requires_grad
    assert "each of its rows is seen 19 times" in "\n".join(recorder.notes)
    for key, value in (
        ("finetune.freeze", "none"),
        ("finetune.adapter", "lora"),
        ("tokenizer.add_tokens", "zyx"),
        ("train.seed", 3),
    ):
        plan = plan_run(config(**{"train.epochs": 0.2, key: value}), recorder)
        is_frozen = plan.config.finetune.freeze == ("embedding",)
        assert is_frozen == (key == "train.seed"), key


def test_an_adapter_is_called_after_the_base_that_it_is_put_on(tmp_path: Path):
    # BERT's class for answers has all options of an ELECTRA of one width.
    folder = write_bert(tmp_path / "electra")
    sizes = json.loads((folder / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    electra = transformers.ElectraConfig(
        **{key: sizes[key] for key in kept}, embedding_size=32, intermediate_size=48
    )
    transformers.ElectraModel(electra).save_pretrained(folder)
    rows = [(text, "what is it", text.split()[0]) for text, _ in labelled_rows(40)]
    data = write_rows(tmp_path / "q.csv", rows, ("context", "question", "answer"))
    settings = {"data.train": str(data), "model.pretrained": str(folder), **SETTINGS}
    lora = {"finetune.adapter": "lora", "train.epochs": 1, "tokenizer.max_length": 64}
    start_run(build_config(overrides={**settings, **lora}), tmp_path / "run", Recorder())
    said = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    base = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    modules = {name for name, _ in base.named_modules()}
    assert said["target_modules"] and modules.issuperset(said["target_modules"])


def test_an_adapter_of_what_no_class_has_is_merged_alone(config, bert: Path, tmp_path: Path):
    recorder = Recorder()
    plan_run(config(**ADAPTED, **{"model.pooling": "first"}), recorder)
    assert not recorder.warnings
    plan_run(config(**ADAPTED, **{"model.pooling": "mean"}), recorder)
    (warning,) = recorder.warnings
    assert "adapter/ will not be written" in warning and "--model.pooling first" in warning
    start_run(config(**ADAPTED, **{"model.pooling": "mean"}), tmp_path / "run", recorder)
    assert not (tmp_path / "run" / "adapter").exists()
    assert "adapter/ is not written: no transformers class" in "\n".join(recorder.notes)
    assert Run(tmp_path / "run").predict("one old hammer")[0]["label"]
