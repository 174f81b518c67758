"""Layer-wise learning rates: the lower a weight, the less fine-tuning moves it.

    head, final norms     1
    top block             decay
    block below           decay ** 2
    ...
    embeddings            decay ** (L + 1)

What lies low has learned what all texts have in common and needs to change least (Howard & Ruder
2018, section 3.2; Clark et al. 2020, "ELECTRA", appendix A.2). Of an encoder-decoder, each stack
counts from its own top.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hasten.core.errors import UsageError
from hasten.model.config import TransformerConfig

_BLOCK = re.compile(r"(encoder|decoder)\.blocks\.(\d+)\.")
_TABLES = re.compile(
    r"(source_)?embedding\.|(encoder|decoder)\.(positions|relative_bias|embedding_norm|projection)\."
)


def layer_rates(names: Iterable[str], config: TransformerConfig, decay: float) -> dict[str, float]:
    """Returns the factor on the learning rate of each weight, by name.

    Args:
        names: of the model's weights.
        config: of the model.
        decay: factor from each block to the one below it, in (0, 1].

    Raises:
        UsageError: ``decay`` is out of range.
    """
    if not 0 < decay <= 1:
        raise UsageError(f"finetune.layer_decay must be above 0 and at most 1, got {decay}.")
    return {name: decay ** _depth(name, config) for name in names}


def _depth(name: str, config: TransformerConfig) -> int:
    """Returns how many steps below the head a weight lies."""
    if found := _BLOCK.match(name):
        return _num_blocks(found[1], config) - int(found[2])
    if found := _TABLES.match(name):
        if found[2]:
            return _num_blocks(found[2], config) + 1
        return max(_num_blocks(stack, config) for stack in ("encoder", "decoder")) + 1
    return 0


def _num_blocks(stack: str, config: TransformerConfig) -> int:
    return config.num_layers if stack == "encoder" else config.decoder_layers
