"""The configuration: which layer wins, what is refused, and that every setting has an effect."""

from __future__ import annotations

import ast
import dataclasses
import functools
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml

from hasten.config.load import (
    build_config,
    config_to_yaml,
    differences,
    known_keys,
    replace_values,
)
from hasten.config.presets import PRESETS
from hasten.config.schema import SECTIONS, ModelConfig, OptimConfig, RunConfig
from hasten.core.errors import UsageError
from hasten.model import config as model_config
from hasten.model.config import TransformerConfig
from hasten.optim.optimizers import OPTIMIZER_NAMES
from hasten.optim.schedules import SCHEDULE_NAMES
from hasten.task.contract import TaskSettings
from hasten.task.registry import TASKS
from hasten.training.prepare import SETTING_KEYS

SOURCE = Path(model_config.__file__).resolve().parents[1]


def literals(annotation: Any) -> list[str]:
    """All words that an annotation admits."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in literals(part)]


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_file_over_the_preset_over_defaults(tmp_path: Path):
    file = write(tmp_path, "model:\n  num_layers: 7\n  dropout: 0.25\ntrain:\n  epochs: 3\n")
    default = build_config()
    config = build_config(
        preset="article", file=file, overrides={"train.epochs": "4.5", "model.dropout": 0.3}
    )
    assert config.train.epochs == 4.5  # flag over file and preset
    assert config.model.dropout == 0.3  # flag over file
    assert config.model.num_layers == 7  # file over preset
    assert config.model.hidden_size == 512  # preset over default
    assert config.train.label_smoothing == default.train.label_smoothing
    assert config.preset == "article"


def test_a_preset_may_be_named_in_the_file_and_a_flag_wins(tmp_path: Path):
    file = write(tmp_path, "preset: tiny\n")
    assert build_config(file=file).model.num_layers == 1
    assert build_config(file=file, preset="small").model.num_layers == 4
    assert build_config(file=file, overrides={"preset": "base"}).model.num_layers == 12


def test_building_leaves_the_presets_alone():
    before = yaml.safe_dump(PRESETS)
    build_config(preset="article", overrides={"model.num_layers": 9, "optim.optimizer": "sgd"})
    assert yaml.safe_dump(PRESETS) == before
    assert build_config(preset="article").model.num_layers == 6


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_says_something(name: str):
    config = build_config(preset=name)
    assert differences(build_config(), config) not in ([], ["preset"])


def test_the_article_preset_is_the_model_of_2017():
    config = build_config(preset="article")
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_heads) == (
        6,
        512,
        8,
    )
    assert config.model.activation == "relu" and config.model.norm_placement == "post"
    assert config.model.positions == "learned" and config.model.dropout == 0.1
    # Adam as in 2017; the rate and the size of a step are what this size of model needs.
    assert (config.optim.optimizer, config.optim.betas) == ("adam", (0.9, 0.999))
    assert (config.train.learning_rate, config.train.tokens_per_step) == (3e-4, 1280)


@pytest.mark.parametrize(
    ("overrides", "nearest"),
    [
        ({"train.epoch": 3}, "train.epochs"),
        ({"train.lerning_rate": 3}, "train.learning_rate"),
        ({"modle.num_layers": 3}, "model.num_layers"),
        ({"tets": "x"}, None),
    ],
)
def test_an_unknown_flag_names_the_nearest(overrides: dict[str, Any], nearest: str | None):
    (key,) = overrides
    with pytest.raises(UsageError, match=f"unknown key '{key}'") as caught:
        build_config(overrides=overrides)
    assert caught.value.exit_code == 2
    assert nearest is None or f"'{nearest}'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epoch: 3\n", r"unknown key 'train\.epoch'.*'train\.epochs'"),
        ("trian:\n  epochs: 3\n", "unknown key 'trian'.*train"),
        ("train:\n  epochs: many\n", r"train\.epochs: 'many' does not fit"),
        ("train: train.csv\n", "train: 'train.csv' does not fit"),
        ("model:\n  dropout: 1.5\n", r"model\.dropout: 1\.5 does not fit.*less than 1"),
        ("optim:\n  optimizer: adamm\n", r"optim\.optimizer: 'adamm' does not fit.*'adamw'"),
        ("- a\n- b\n", "expected sections"),
        ("train: [\n", "line 2: not valid YAML"),
        ("preset: tinny\n", "unknown preset 'tinny'.*'tiny'"),
        ("preset: [tiny]\n", "preset"),
        ("train:\n  epochs: .nan\n", r"train\.epochs"),
        ("eval:\n  patience: -1\n", r"eval\.patience: -1 does not fit"),
        ("train:\n  seed: -1\n", r"train\.seed: -1 does not fit"),
    ],
)
@pytest.mark.parametrize("overrides", [{}, {"train.log_every": 5, "eval.per_epoch": 2}])
def test_a_wrong_file_is_refused_in_one_line(
    text: str, message: str, overrides: dict[str, Any], tmp_path: Path
):
    with pytest.raises(UsageError, match=message) as caught:
        build_config(file=write(tmp_path, text), overrides=overrides)
    assert len(str(caught.value).splitlines()) == 1


def refusal(key: str, value: Any) -> str | None:
    """What is said of a value; None where it is taken."""
    try:
        build_config(overrides={key: value})
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", [k for k in known_keys() if k != "preset" and refusal(k, "3x")])
def test_a_refusal_names_key_value_and_what_is_accepted(key: str):
    """What it says is accepted is accepted, and what lies beyond the bounds it names is not."""
    message = refusal(key, "3x")
    start = f"{key}: '3x' does not fit: it should be "
    assert message is not None and message.startswith(start) and message.endswith(".")
    accepted = message.removeprefix(start)
    assert re.match(r"'|a number\b|a whole number\b|true or false\b|[23] values\b", accepted)
    for word in re.findall(r"'(\w+)'|\b(true|false)\b", accepted):
        assert refusal(key, "".join(word)) is None
    several = re.match(r"(\d) values", accepted)
    others = ",0.5" * (int(several[1]) - 1) if several else ""
    for bound, text in re.findall(r"(at least|at most|greater than|less than) (\d+)", accepted):
        limit = int(text)
        beyond, within = limit + 1e-9, limit - 1e-9
        if bound in ("at least", "greater than"):
            beyond, within = within, beyond
        if "whole" in accepted:
            beyond, within = limit - 1, limit + 1
        for value, fits in ((limit, bound.startswith("at")), (beyond, False), (within, True)):
            written = f"{value}{others}"
            assert (refusal(key, written) is None) == fits, written
    if "number" in accepted:
        assert ("whole" in accepted) == (refusal(key, f"0.5{others}") is not None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epochs: [1]\n", "train.epochs: [1] does not fit: it should be a number"),
        (
            "optim:\n  betas: [0.9, 2]\n",
            "optim.betas: [0.9, 2] does not fit: it should be 2 values",
        ),
        ("data:\n  train: 5\n", "data.train: 5 does not fit: it should be a text, or a list"),
        (
            "data:\n  source: [a]\n",
            "data.source: ['a'] does not fit: it should be a text, or 'none'",
        ),
    ],
)
def test_the_whole_value_is_shown_as_it_was_given(text: str, message: str, tmp_path: Path):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        build_config(file=write(tmp_path, text))


def test_missing_and_unreadable_files_are_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"nothing.yaml: no such"):
        build_config(file=tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        build_config(file=tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        build_config(file=tmp_path / "binary")
    assert build_config(file=write(tmp_path, "")) == build_config()
    assert build_config(file=write(tmp_path, "train:\n  # epochs: 3\n")) == build_config()


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path):
    config = build_config(file=write(tmp_path, "train:\n  learning_rate: 3e-4\n  l2: 1e-5\n"))
    assert config.train.learning_rate == 3e-4 and config.train.l2 == 1e-5
    flags = {"optim.betas": "0.9, 0.98", "data.text_columns": "a, b", "data.label_column": 3}
    config = build_config(overrides=flags)
    assert config.optim.betas == (0.9, 0.98)
    assert config.data.text_columns == ("a", "b") and config.data.label_column == "3"


@pytest.mark.parametrize("columns", ["1", "[1, 2]", "title", "[title, body]"])
def test_text_columns_may_be_names_or_numbers(columns: str, tmp_path: Path):
    file = write(tmp_path, f"data:\n  text_columns: {columns}\n")
    wanted = tuple(columns.strip("[]").split(", "))
    assert build_config(file=file).data.text_columns == wanted


SAMPLES: dict[str, Any] = {
    "preset": "tiny",
    "data.header": True,
    "data.text_columns": ("a", "1"),
    "optim.betas": (0.8, 0.95),
    "parallel.stage_costs": (0.5, 1.0, 2.0),
    "data.delimiter": "\t",
    "data.label_column": "yes",
    "data.train": ("some/file",),
    "data.validation": ("some/file",),
    "data.test": ("some/file",),
    "data.augment": ("word_swap", "char_noise=0.05"),
    "tokenizer.add_tokens": ("<one>", "two"),
    "finetune.freeze": ("embedding", "*.blocks.0"),
    "finetune.targets": ("query",),
}


def other_value(key: str) -> Any:
    """A valid value that is not the default."""
    section, _, name = key.rpartition(".")
    model = SECTIONS[section] if section else RunConfig
    field = model.model_fields[name]
    if key in SAMPLES:
        return SAMPLES[key]
    words = [w for w in literals(field.annotation) if w not in ("auto", field.default)]
    if words:
        return words[-1]
    for value in (True, False, 3, 0.25, "some/file"):
        if value == field.default:
            continue
        try:
            result = replace_values(RunConfig(), {key: value})
        except UsageError:
            continue
        found = getattr(getattr(result, section) if section else result, name)
        if found == value and type(found) is type(value):
            return value
    if key == "task":
        return "text-classification"
    raise AssertionError(f"give SAMPLES a value for {key}")


@pytest.mark.parametrize("key", known_keys())
def test_every_key_can_be_set_saved_and_read_back(key: str, tmp_path: Path):
    value = other_value(key)
    config = replace_values(RunConfig(), {key: value})
    assert differences(RunConfig(), config) == [key]
    again = build_config(file=write(tmp_path, config_to_yaml(config)))
    if key == "preset":  # a preset's own settings are filled in when it is named
        assert again.preset == value
        return
    assert again == config
    # As text, which is how the command line gives it.
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert build_config(overrides={key: text}) == config


@pytest.mark.parametrize("key", known_keys())
def test_every_word_of_a_choice_can_be_written_as_a_flag(key: str):
    section, _, name = key.rpartition(".")
    model = SECTIONS[section] if section else RunConfig
    for word in literals(model.model_fields[name].annotation):
        config = build_config(overrides={key: word})
        assert getattr(getattr(config, section) if section else config, name) == word


@pytest.mark.parametrize("key", ["data.train", "data.validation", "data.test"])
def test_several_files_are_a_list_and_one_name_is_one_file(key: str, tmp_path: Path):
    section, _, name = key.partition(".")
    for text, wanted in (
        ("[a.csv, b.csv]", ("a.csv", "b.csv")),
        ("\n  - a.csv\n  - c, d.csv", ("a.csv", "c, d.csv")),
        ("c, d.csv", ("c, d.csv",)),  # a file may be called so
    ):
        config = build_config(file=write(tmp_path, f"{section}:\n  {name}: {text}\n"))
        assert getattr(config.data, name) == wanted
        assert build_config(overrides={key: wanted}) == config
    assert getattr(build_config(overrides={key: "c, d.csv"}).data, name) == ("c, d.csv",)


def test_augmentation_may_be_none_one_kind_or_several():
    for text, wanted in (
        ("none", ("none",)),
        ("word_swap", ("word_swap",)),
        ("word_swap, char_noise=0.05", ("word_swap", "char_noise=0.05")),
    ):
        assert build_config(overrides={"data.augment": text}).data.augment == wanted


def test_none_unsets_what_may_be_unset():
    config = replace_values(RunConfig(), {"data.test": "a.csv", "optim.momentum": 0.5})
    config = replace_values(config, {"data.test": "none", "optim.momentum": "null"})
    assert config == RunConfig()


def test_a_resolved_configuration_with_a_preset_reads_back_to_itself(tmp_path: Path):
    config = build_config(
        preset="article", overrides={"model.num_layers": 2, "data.train": "é.csv"}
    )
    again = build_config(file=write(tmp_path, config_to_yaml(config)))
    assert again == config


def test_random_configurations_survive_the_file(tmp_path: Path):
    draw = random.Random(0)
    keys = [key for key in known_keys() if key != "preset"]
    for _ in range(30):
        chosen = {key: other_value(key) for key in draw.sample(keys, 12)}
        config = replace_values(RunConfig(), chosen)
        assert build_config(file=write(tmp_path, config_to_yaml(config))) == config
        assert sorted(differences(RunConfig(), config)) == sorted(chosen)


def test_a_configuration_is_immutable_and_small_enough_to_know():
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="frozen"):
        config.train = None  # pyright: ignore[reportAttributeAccessIssue]
    assert len(known_keys()) <= 110
    for name, section in SECTIONS.items():
        assert 0 < len(section.model_fields) <= 25, name
    assert set(SECTIONS) == {
        name
        for name, field in RunConfig.model_fields.items()
        if field.annotation in SECTIONS.values()
    }


def test_every_field_has_a_help_text():
    for section in (RunConfig, *SECTIONS.values()):
        for name, field in section.model_fields.items():
            if name not in SECTIONS:
                assert field.description and len(field.description) > 8, name


def test_the_words_are_those_of_the_packages():
    optimizers = literals(OptimConfig.model_fields["optimizer"].annotation)
    assert set(optimizers) == {"auto", *OPTIMIZER_NAMES}
    assert set(literals(OptimConfig.model_fields["schedule"].annotation)) == set(SCHEDULE_NAMES)
    from hasten.data.augment import KINDS as AUGMENTATIONS
    from hasten.data.tokenizer import KINDS
    from hasten.task.text_classification import LossSettings

    fields = SECTIONS["tokenizer"].model_fields
    assert set(literals(fields["kind"].annotation)) == {*KINDS, "pretrained"}
    kinds = literals(LossSettings.__dataclass_fields__["kind"].type and _hint(LossSettings, "kind"))
    assert set(literals(SECTIONS["train"].model_fields["loss"].annotation)) == set(kinds)
    segments = SECTIONS["data"].model_fields["segments"].annotation
    assert set(literals(segments)) <= set(literals(_hint(TaskSettings, "segments")))
    description = RunConfig.model_fields["task"].description
    assert description is not None and all(name in description for name in TASKS)
    description = SECTIONS["data"].model_fields["augment"].description
    assert description is not None and all(name in description for name in AUGMENTATIONS)


def _hint(cls: type, name: str) -> Any:
    from typing import get_type_hints

    return get_type_hints(cls)[name]


# What only the folder of a pretrained model says.
OF_PRETRAINED_ALONE = {
    "head_dim",
    "norm_epsilon",
    "first_norm",
    "embedding_norm",
    "embedding_size",
    "embedding_scale",
    "global_layers",
    "attention_scale",
    "attention_softcap",
    "logit_scale",
    "logit_bias",
    "sinusoids",
    "position_offset",
    "relative_buckets",
    "relative_max_distance",
    "rotary_base",
    "local_rotary_base",
    "rotary_scaling",
    "qkv_bias",
    "output_bias",
    "head_activation",
    "head_norm",
    "head_bias",
    "unused",
}


def test_model_settings_admit_what_the_model_admits():
    decided_by_the_task = {
        "vocab_size",
        "source_vocab_size",
        "max_positions",
        "num_token_types",
        "num_labels",
        "architecture",
        "head",
    }
    given_elsewhere = decided_by_the_task | OF_PRETRAINED_ALONE
    for field in dataclasses.fields(TransformerConfig):
        words = literals(_hint(TransformerConfig, field.name))
        if words and field.name not in given_elsewhere:
            assert set(literals(ModelConfig.model_fields[field.name].annotation)) == set(words)
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(ModelConfig.model_fields) - {"pretrained", "portable"} == names - given_elsewhere


@functools.cache
def read_attributes() -> frozenset[str]:
    """Names read as attributes, or by name in a string, outside hasten.config."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        if path.parent.name in ("config", "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                inner = node.value
                owner = inner.attr if isinstance(inner, ast.Attribute) else None
                owner = inner.id if isinstance(inner, ast.Name) else owner
                found.add(f"{owner}.{node.attr}")
    return frozenset(found)


# Names that stand for a section where the code keeps one in a variable.
OWNERS = {
    "data": {"data", "config", "reading"},
    "tokenizer": {"tokenizer", "settings"},
    "model": {"model", "config"},
    "train": {"train"},
    "optim": {"optim"},
    "finetune": {"finetune", "config"},
    "parallel": {"parallel"},
    "eval": {"eval"},
    "": {"config"},
}


# Read under names that are put together from the split's; test_sources opens each.
FILES = {
    f"data.{split}{suffix}"
    for split, suffixes in (
        ("train", ("",)),
        ("validation", ("", "_source", "_target")),
        ("test", ("", "_source", "_target")),
    )
    for suffix in suffixes
}


@pytest.mark.parametrize("key", [key for key in known_keys() if key not in ("task", "preset")])
def test_no_setting_is_silently_ignored(key: str):
    section, _, name = key.rpartition(".")
    if section == "model" and name != "pooling":
        return  # all of them reach the model: see test_training_loop
    if key in FILES:
        return
    if key in SETTING_KEYS.values():  # a task honours it, and the others refuse it
        (setting,) = (name for name, place in SETTING_KEYS.items() if place == key)
        assert any(setting in task.uses for task in TASKS.values())
        return
    reads = {f"{owner}.{name}" for owner in OWNERS[section]}
    assert reads & read_attributes(), f"nothing outside hasten.config reads {key}"


def test_the_settings_of_tasks_are_all_of_them_and_every_task_says_which_it_honours():
    names = {field.name for field in dataclasses.fields(TaskSettings)} - {"framing"}
    assert names == SETTING_KEYS.keys()
    assert set(SETTING_KEYS.values()) <= set(known_keys())
    for task in TASKS.values():
        assert task.uses <= names, task.name


def test_importing_the_configuration_imports_no_torch():
    code = (
        "import sys, hasten.config.load, hasten.config.presets; "
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_union_members_are_found_by_the_helper():
    assert literals(Union[Literal["a", "b"], int, None]) == ["a", "b"]  # noqa: UP007
