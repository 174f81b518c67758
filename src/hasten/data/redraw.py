"""Training tokens that are drawn anew in every epoch, where augmentation is on.

    rows --augment_text--> texts of (seed, epoch, row) --tokenizer, or BPE-dropout--> TokenStore

Drawing comes before the epoch's batches are planned and depends on nothing but seed, epoch and
row, so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from hasten.core.seeds import derive_seed
from hasten.data.augment import Augmentation, augment_text
from hasten.data.corpus import Corpus
from hasten.data.subword import SubwordDropout
from hasten.data.tokenizer import MASK, UNKNOWN, token_named
from hasten.data.tokens import EncodingFormat, TokenStore, encode_texts

Redraw = Callable[[int], TokenStore]
"""From the number of an epoch to the tokens it has."""

_CHUNK = 1000


def redrawn_tokens(
    corpus: Corpus,
    rows: np.ndarray,
    tokenizer: Tokenizer,
    form: EncodingFormat,
    *,
    augmentation: Augmentation,
    seed: int,
) -> Redraw | None:
    """Returns how each epoch's tokens are drawn, or None where every epoch has the same.

    Args:
        corpus: the rows.
        rows: (E,) those that are drawn, in ascending order; others get no tokens.
        tokenizer: of the run.
        form: how a row's cells become one sequence.
        augmentation: what is changed, at which rates.
        seed: of the run.

    Raises:
        UsageError: the tokenizer lacks what an augmentation needs.
    """
    if augmentation.is_off:
        return None
    reader = _without_space_before_marks(tokenizer) if augmentation.changes_text else tokenizer
    subword = None
    if augmentation.bpe_dropout:
        subword = SubwordDropout.build(
            corpus, rows, reader, form, rate=augmentation.bpe_dropout, seed=seed
        )
    if not augmentation.changes_text:
        return None if subword is None else subword.store
    unknown = token_named(tokenizer, UNKNOWN, "<unk>") if augmentation.word_dropout else ""
    mask = token_named(tokenizer, MASK, "<mask>") if augmentation.word_mask else ""

    def augmented(epoch: int, row: int, cells: tuple[str, ...]) -> tuple[str, ...]:
        draw = random.Random(derive_seed("augment", seed, epoch, row))
        return tuple(
            augment_text(cell, augmentation, draw, unknown=unknown, mask=mask) for cell in cells
        )

    def store(epoch: int) -> TokenStore:
        ids, types, num_cut = array("l"), array("b"), 0
        lengths = np.zeros(len(corpus), dtype=np.int64)
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            texts = zip(chunk.tolist(), corpus.texts(chunk), strict=True)
            changed = [augmented(epoch, row, cells) for row, cells in texts]
            if subword is None:
                encoded = encode_texts(reader, changed, form)
            else:
                encoded = subword.encode(epoch, chunk.tolist(), changed)
            for row, text in zip(chunk.tolist(), encoded, strict=True):
                ids.extend(text.token_ids)
                types.extend(text.token_types)
                lengths[row] = len(text.token_ids)
                num_cut += text.num_cut > 0
        wide = tokenizer.get_vocab_size() > 1 << 16
        return TokenStore(
            token_ids=np.asarray(ids, dtype=np.uint32 if wide else np.uint16),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            token_types=np.asarray(types, np.uint8) if form.has_types else None,
            num_truncated=num_cut,
        )

    return store


def _without_space_before_marks(tokenizer: Tokenizer) -> Tokenizer:
    """Returns a tokenizer that reads " [MASK]" as the mask alone, not as a space and the mask."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["lstrip"] = token["content"] in (UNKNOWN, MASK, "<unk>", "<mask>")
    return Tokenizer.from_str(json.dumps(content))
