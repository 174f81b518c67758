"""What a family of pretrained models is: a map of its options and a map of its tensors' names.

    config.json --Given, options--> fields of TransformerConfig --config--> config.json
    "encoder.layer.0.attention.self.query.weight" --Rule-- "encoder.blocks.0.attention.query.weight"

An option is honoured, or an error names it: what nobody took of a config.json is refused, unless it
means nothing to any model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import DamagedError, HastenError, UsageError
from hasten.model.config import Activation, Architecture, Head, RotaryScaling, TransformerConfig

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Their names of nonlinearities; the first of those that mean the same is the one written."""
GATED: dict[Activation, Activation] = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}
"""What a feed-forward with a gate is called, by the nonlinearity of the gate."""

# What every config.json may hold and no forward pass looks at.
_MEANINGLESS = (  # noqa: SIM905 - one a line would fill a page
    "architectures model_type torch_dtype dtype transformers_version use_cache name_or_path prefix "
    "_name_or_path id2label label2id num_labels _num_labels problem_type finetuning_task language "
    "task_specific_params return_dict return_dict_in_generate output_attentions output_scores "
    "output_hidden_states torchscript use_bfloat16 tf_legacy_loss gradient_checkpointing "
    "tokenizer_class bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id "
    "mask_token_id unk_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id "
    "bad_words_ids max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences suppress_tokens "
    "remove_invalid_values begin_suppress_tokens exponential_decay_length_penalty "
    "normalize_before_generation pretraining_tp pretrained_config_archive_map output_past "
    "_attn_implementation attn_implementation _attn_implementation_autoset is_encoder_decoder "
    "chunk_size_feed_forward transformers.js_config unsloth_fixed unsloth_version"
).split()
# And what must be off for any of our families.
_OFF = ("is_decoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads", "auto_map")
_MISSING = object()
_MOST_LAYERS = 1 << 14


class Given:
    """A config.json that remembers what was asked of it.

    Args:
        content: the file's object.
        origin: what to call it in errors.
    """

    def __init__(self, content: Mapping[str, Any], origin: str) -> None:
        self.content, self.origin = content, origin
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """Returns a value that is honoured whatever it is."""
        self._taken.add(key)
        return self.content.get(key, default)

    def need(self, key: str, kind: type = int) -> Any:
        """Returns a value that has to be there.

        Raises:
            UsageError: it is not, or is of another kind.
        """
        value = self.take(key, _MISSING)
        if value is _MISSING:
            raise UsageError(f"{self.origin}: {key} is missing.")
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise UsageError(f"{self.origin}: {key} is {value!r}, not of kind {kind.__name__}.")
        return value

    def layers(self, key: str) -> range:
        """Returns the numbers of the blocks.

        Raises:
            UsageError: as ``need``.
            DamagedError: there are more than any model has.
        """
        count = self.need(key)
        if count > _MOST_LAYERS:
            raise DamagedError(f"{self.origin}: {key} is {count:,}; at most {_MOST_LAYERS:,} are.")
        return range(count)

    def expect(self, key: str, *values: Any, default: Any = _MISSING) -> Any:
        """Returns a value of which only some are honoured; a missing one is the first.

        Raises:
            UsageError: it is another.
        """
        value = self.take(key, values[0] if default is _MISSING else default)
        if not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in values
        ):
            known = " or ".join(repr(one) for one in values)
            raise UsageError(f"{self.origin}: {key} is {value!r}; only {known} is honoured here.")
        return value

    def activation(self, key: str, default: str = "gelu") -> Activation:
        """Returns a nonlinearity by our name.

        Raises:
            UsageError: we have none such.
        """
        return ACTIVATIONS[self.expect(key, default, *ACTIVATIONS)]

    def ignore(self, *keys: str) -> None:
        """Marks keys of this family that change nothing of what a model computes."""
        self._taken.update(keys)

    def unused(self, *keys: str) -> tuple[tuple[str, float], ...]:
        """Returns the rates above 0 that act in training alone and that no module here has."""
        rates = ((key, self.take(key) or 0.0) for key in keys)
        return tuple((key, float(rate)) for key, rate in rates if rate)

    def rotary(
        self, default_base: float = 10000.0, layer_type: str | None = None
    ) -> tuple[float, RotaryScaling | None]:
        """Returns base and scaling of rotary positions, as old or new config.json files say.

        Old ones have ``rope_theta`` and ``rope_scaling``; those of transformers 5
        ``rope_parameters``, where kinds of layers differ one for each.

        Raises:
            UsageError: a kind of scaling that is not honoured.
        """
        base = self.take("rope_theta", default_base)
        values = self.take("rope_scaling") or {}
        new = self.take("rope_parameters") or {}
        if layer_type is not None and layer_type in new:
            new = new[layer_type] or {}
        values = {**values, **new}
        base = values.pop("rope_theta", base)
        return float(base), _scaling(values, self.take("max_position_embeddings"), self.origin)

    def finish(self) -> None:
        """Refuses what nobody asked for.

        Raises:
            UsageError: naming every such key.
        """
        unknown = sorted(set(self.content) - self._taken - {*_MEANINGLESS})
        unknown = [key for key in unknown if self.content[key] is not None]
        unknown = [key for key in unknown if key not in _OFF or self.content[key]]
        if unknown:
            shown = ", ".join(f"{key} ({self.content[key]!r:.60})" for key in unknown)
            raise UsageError(f"{self.origin}: not honoured here: {shown}.")


def _scaling(values: dict[str, Any], positions: Any, origin: str) -> RotaryScaling | None:
    left = {key: value for key, value in values.items() if value is not None}
    kind = left.pop("rope_type", left.pop("type", "default"))
    left.pop("type", None)
    if left.get("partial_rotary_factor") == 1:
        del left["partial_rotary_factor"]
    found = None
    try:
        if kind == "linear":
            found = RotaryScaling("linear", float(left.pop("factor")))
        elif kind in ("llama3", "yarn"):
            original = int(left.pop("original_max_position_embeddings", positions))
            read = _read_llama3 if kind == "llama3" else _read_yarn
            found = read(left, float(left.pop("factor")), original)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{origin}: rope_scaling of kind {kind!r} lacks {error}.") from None
    if left or (found is None and kind != "default"):
        raise UsageError(
            f"{origin}: rope_scaling of kind {kind!r} ({left}) is not honoured here; linear, "
            "llama3 and yarn are."
        )
    return found


def _read_llama3(left: dict[str, Any], factor: float, original: int) -> RotaryScaling:
    return RotaryScaling(
        "llama3",
        factor,
        original,
        low_frequency_factor=float(left.pop("low_freq_factor")),
        high_frequency_factor=float(left.pop("high_freq_factor")),
    )


def _read_yarn(left: dict[str, Any], factor: float, original: int) -> RotaryScaling:
    return RotaryScaling(
        "yarn",
        factor,
        original,
        beta_fast=float(left.pop("beta_fast", 32)),
        beta_slow=float(left.pop("beta_slow", 1)),
        attention_factor=left.pop("attention_factor", None),
    )


def scaling_to_json(scaling: RotaryScaling | None) -> dict[str, Any] | None:
    """Returns ``rope_scaling`` of a config.json."""
    if scaling is None:
        return None
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        found["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        found["low_freq_factor"] = scaling.low_frequency_factor
        found["high_freq_factor"] = scaling.high_frequency_factor
    if scaling.kind == "yarn":
        found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            found["attention_factor"] = scaling.attention_factor
    return found


@dataclass(frozen=True)
class Rule:
    """How a tensor is called and laid out there, and which of ours it is.

    Attributes:
        other: its name there, without the prefix of the body.
        own: ours; several lie there in one, along their outputs.
        transposed: there a matrix is (inputs, outputs).
        plus: ours is theirs and this number.
        is_row: there a vector is a matrix of one row.
        aliases: other names that the same tensor may have there, or copies of it.
        is_outside: of the body: it has no prefix.
        is_optional: may be missing, and is then drawn anew.
        is_of_labels: has a row for each label; those there may be others, or another number of
            them, and it is then drawn anew.
    """

    other: str
    own: tuple[str, ...]
    transposed: bool = False
    plus: float = 0.0
    is_row: bool = False
    aliases: tuple[str, ...] = ()
    is_outside: bool = False
    is_optional: bool = False
    is_of_labels: bool = False

    def to_own(self, tensor: Tensor, num_outputs: list[int]) -> list[Tensor]:
        """Returns our tensors, of which each has so many rows; views where that can be."""
        if self.transposed and tensor.ndim == 2:
            tensor = tensor.T
        if self.is_row:
            tensor = tensor[0]
        if self.plus:
            tensor = tensor.float() + self.plus
        return list(tensor.split(num_outputs)) if len(self.own) > 1 else [tensor]

    def to_other(self, tensors: list[Tensor]) -> Tensor:
        """Returns the tensor as it lies there."""
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.plus:
            tensor = tensor - self.plus
        if self.is_row:
            tensor = tensor[None]
        return tensor.T.contiguous() if self.transposed and tensor.ndim == 2 else tensor


def rule(other: str, *own: str, **options: Any) -> Rule:
    """Returns the rule of one tensor."""
    return Rule(other, own, **options)


def linear(other: str, *own: str, bias: bool = True, **options: Any) -> Iterator[Rule]:
    """Yields the rules of a module with a weight and, where ``bias``, a bias."""
    yield Rule(f"{other}.weight", tuple(f"{name}.weight" for name in own), **options)
    if bias:
        yield Rule(f"{other}.bias", tuple(f"{name}.bias" for name in own), **options)


def head_rules(other: str, own: str, *, bias: bool = True, **options: Any) -> Iterator[Rule]:
    """Yields the rules of a module of a head, which a checkpoint for another task has not."""
    return linear(other, own, bias=bias, is_outside=True, is_optional=True, **options)


def classifier_rules(other: str, own: str, *, bias: bool = True) -> Iterator[Rule]:
    """Yields the rules of a head's last module, whose rows are the labels of a checkpoint."""
    return head_rules(other, own, bias=bias, is_of_labels=True)


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
        name: to show.
        model_types: of config.json; the first is the one written.
        architecture: of its models.
        prefix: of its body's tensors in models with a head, such as "bert."; may be missing.
        classes: the transformers class for each head that we have.
        options: fields of ``TransformerConfig``, from a config.json and the wanted head.
        config: a config.json, from a ``TransformerConfig``; whatever it cannot say is left out.
        rules: for every tensor of a model.
        ignored: patterns (fnmatch) of tensors without a meaning of their own.
        ties: names of the matrix that scores tokens and of the embeddings, where files decide
            whether they are one, and not what config.json says.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: Architecture
    prefix: str
    classes: Mapping[Head, str]
    options: Callable[[Given, Head], dict[str, Any]]
    config: Callable[[TransformerConfig], dict[str, Any]]
    rules: Callable[[TransformerConfig], Iterable[Rule]]
    ignored: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()

    def read(self, content: Mapping[str, Any], head: Head, origin: str) -> dict[str, Any]:
        """Returns the fields of ``TransformerConfig`` that a config.json means.

        Raises:
            UsageError: an option that is not honoured, or a head that the family has not.
            DamagedError: a value that makes no sense.
        """
        if head not in self.classes:
            known = ", ".join(name.replace("_", " ") for name in self.classes)
            raise UsageError(
                f"{origin}: a {self.name} model does {known}, not {head.replace('_', ' ')}."
            )
        given = Given(content, origin)
        if head != "language_modelling":
            given.ignore("tie_word_embeddings")  # nothing scores tokens
        try:
            options = self.options(given, head)
        except HastenError:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise DamagedError(f"{origin}: a value is of the wrong kind: {error}.") from None
        given.finish()
        return {"architecture": self.architecture, "head": head, **options}


def written_activation(activation: Activation) -> str:
    """Returns their name of a nonlinearity, or of that of a gate; ours where they have none."""
    plain = {gated: name for name, gated in GATED.items()}.get(activation, activation)
    return next((name for name, own in ACTIVATIONS.items() if own == plain), plain)
