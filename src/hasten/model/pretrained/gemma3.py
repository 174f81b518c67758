"""Gemma 3 (Gemma Team 2025), its text models: five blocks with a window for each that sees all.

Blocks of the two kinds have bases of their own, and only those that see all stretch the rotary
frequencies. Queries and keys are normalised instead of bounding attention scores.
"""

from __future__ import annotations

from typing import Any

from hasten.core.errors import UsageError
from hasten.model.config import Head, TransformerConfig
from hasten.model.pretrained.family import Family, Given
from hasten.model.pretrained.gemma2 import config_of_gemma, options_of_gemma, rules_of_gemma
from hasten.model.pretrained.rotary_decoder import (
    GLOBAL,
    IGNORED,
    LOCAL,
    decoder_classes,
    options_of_windows,
)

_GLOBAL_BASE, _LOCAL_BASE = 1_000_000.0, 10_000.0


def _rotations(given: Given, has_windows: bool) -> dict[str, Any]:
    kinds = given.take("rope_parameters") or {}
    if not {*kinds} <= {GLOBAL, LOCAL}:
        raise UsageError(f"{given.origin}: rope_parameters has others than '{GLOBAL}', '{LOCAL}'.")
    base, scaling = given.rotary(_GLOBAL_BASE, GLOBAL)
    local_base = given.take("rope_local_base_freq", _LOCAL_BASE)
    # rope_theta and rope_scaling are those of blocks that see all.
    local = Given({"rope_parameters": kinds.get(LOCAL)}, given.origin)
    local_base, local_scaling = local.rotary(local_base)
    if local_scaling is not None:
        raise UsageError(
            f"{given.origin}: rope_parameters of '{LOCAL}' are scaled, which is not honoured here."
        )
    return {
        "rotary_base": base,
        "rotary_scaling": scaling,
        "local_rotary_base": local_base if has_windows else None,
    }


def _options(given: Given, head: Head) -> dict[str, Any]:
    # Files call the number of blocks from one that sees all to the next by either name.
    every = given.take("sliding_window_pattern") or given.take("_sliding_window_pattern") or 6
    given.ignore("_sliding_window_pattern")
    # There is such a key, but no version of transformers bounds the scores of this model.
    given.expect("attn_logit_softcapping", None)
    layers = given.layers("num_hidden_layers")
    kinds = [LOCAL if (i + 1) % every else GLOBAL for i in layers]
    windows = options_of_windows(given, given.take("sliding_window", 4096), kinds)
    return {
        **options_of_gemma(given, head),
        **windows,
        **_rotations(given, bool(windows["sliding_window"])),
        "qk_norm": True,
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    content = config_of_gemma(config)
    kinds = content["layer_types"]
    return {
        **content,
        "rope_local_base_freq": config.local_rotary_base or config.rotary_base,
        # Versions of transformers before 4.53 know it instead of the kinds.
        "sliding_window_pattern": kinds.index(GLOBAL) + 1 if GLOBAL in kinds else len(kinds) + 1,
        "attn_logit_softcapping": None,
    }


GEMMA3 = Family(
    name="Gemma 3",
    model_types=("gemma3_text",),
    architecture="decoder",
    prefix="model.",
    classes=decoder_classes("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    options=_options,
    config=_config,
    rules=rules_of_gemma,
    ignored=IGNORED,
)
