"""SentencePiece models (.spm, .model) as tokenizers of the `tokenizers` library.

file --read_sentencepiece--> SentencePieceModel: pieces in the order of the file, normaliser
pieces in the order of a vocabulary, model --build_tokenizer--> Tokenizer

The file is a protocol buffer (google/sentencepiece, sentencepiece_model.proto), of which eight
fields matter. They are read here, so that neither that package nor protobuf is needed and no
damaged length or table is believed.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from hasten.core.errors import DamagedError, UsageError

SPACE = "▁"
# Before pieces that have a number and a text, but that no text is cut into: U+FFFF is no character.
_UNREACHABLE = "\uffff"
_UNIGRAM, _BPE = 1, 2
_REPEATED_SPACES = Regex(r"\A +| +\z| +(?= )")


class Kind(IntEnum):
    """What a piece is, by its number in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # such as </s>: never read from a text
    USER_DEFINED = 4  # always cut out first
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A token: its text, its logarithmic probability or rank, and what it is."""

    text: str
    score: float = 0.0
    kind: Kind = Kind.CONTROL


@dataclass(frozen=True)
class SentencePieceModel:
    """What a file says.

    Attributes:
        pieces: in the order of the file.
        is_bpe: scores are ranks of merges; else a unigram language model's.
        has_bytes: characters without a piece are written as bytes.
        charsmap: compiled table of what stands for which characters; empty for none.
        begins_with_space: as if a space stood before each text.
        removes_spaces: at both ends, and of several all but one.
    """

    pieces: tuple[Piece, ...]
    is_bpe: bool
    has_bytes: bool
    charsmap: bytes
    begins_with_space: bool
    removes_spaces: bool


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """Reads a model.

    Raises:
        UsageError: there is no such file, or it is of a kind that is not honoured.
        DamagedError: it is cut off or altered.
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such SentencePiece model.")
    try:
        model = _read(file.read_bytes())
    except (ValueError, struct.error) as error:
        if isinstance(error, UsageError):
            raise UsageError(f"{file}: {error}") from None
        raise DamagedError(f"{file}: not a SentencePiece model, or damaged: {error}.") from None
    return model


def build_tokenizer(model: SentencePieceModel, pieces: Sequence[Piece]) -> Tokenizer:
    """Returns a tokenizer whose token numbers are the places in ``pieces``.

    Pieces that the model has not, and its unused ones, have numbers but are read from no text.

    Args:
        model: whose pieces and scores cut texts, and whose normaliser comes before.
        pieces: of the vocabulary, in order; one of them is unknown.
    """
    scores = {p.text: p.score for p in model.pieces if p.kind is Kind.NORMAL}
    numbered = list[tuple[str, float]]()
    for piece in pieces:
        is_named = piece.kind not in (Kind.NORMAL, Kind.UNUSED)
        is_read = is_named or piece.text in scores
        text = piece.text if is_read else _UNREACHABLE + piece.text
        numbered.append((text, 0.0 if is_named else scores.get(piece.text, 0.0)))
    unknown = next(i for i, piece in enumerate(pieces) if piece.kind is Kind.UNKNOWN)
    if model.is_bpe:
        merges = _merges({text: score for text, score in numbered if text in scores})
        cutter: models.Model = models.BPE(
            {text: number for number, (text, _) in enumerate(numbered)},
            merges,
            unk_token=pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=model.has_bytes,
        )
    else:
        cutter = models.Unigram(numbered, unknown, model.has_bytes)
    tokenizer = Tokenizer(cutter)
    tokenizer.normalizer = _normalizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(model, pieces)
    tokenizer.decoder = _decoder(model)
    special = [p.text for p in pieces if p.kind in (Kind.CONTROL, Kind.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    defined = [p.text for p in pieces if p.kind is Kind.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in defined])
    return tokenizer


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    steps = list[normalizers.Normalizer]()
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.removes_spaces:
        steps.append(normalizers.Replace(_REPEATED_SPACES, ""))
    if model.begins_with_space:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _pre_tokenizer(
    model: SentencePieceModel, pieces: Sequence[Piece]
) -> pre_tokenizers.PreTokenizer:
    # Cutting at spaces first is faster; a piece of several words would be lost by it.
    joins_words = any(SPACE in p.text[1:] for p in model.pieces if p.kind is Kind.NORMAL)
    spaces = pre_tokenizers.Metaspace(SPACE, "never", split=not joins_words)
    # "</s>" in a text is four characters: what looks like a name is parted behind its first.
    named = (Kind.CONTROL, Kind.UNKNOWN, Kind.BYTE)
    rests = dict[str, list[str]]()
    for piece in pieces:
        if piece.kind in named and len(piece.text) > 1 and not model.is_bpe:
            rests.setdefault(piece.text[0], []).append(re.escape(piece.text[1:]))
    if not rests:
        return spaces
    pattern = "|".join(f"{re.escape(c)}(?={'|'.join(rest)})" for c, rest in rests.items())
    return pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex(pattern), "isolated")])


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    shown = [decoders.Replace(_UNREACHABLE, ""), decoders.Replace(SPACE, " ")]
    first = [decoders.Strip(" ", 1, 0)] if model.begins_with_space else []
    return decoders.Sequence([*shown, decoders.ByteFallback(), decoders.Fuse(), *first])


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns every way to join two pieces to a third one, the best joined piece first."""
    found = list[tuple[float, int, str, str]]()
    for whole, score in scores.items():
        for at in range(1, len(whole)):
            left, right = whole[:at], whole[at:]
            if left in scores and right in scores:
                found.append((-score, -at, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


# The file


def _read(content: bytes) -> SentencePieceModel:
    pieces = list[Piece]()
    specs: dict[int, dict[int, int | bytes]] = {}
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(value))
        elif number in (2, 3):
            specs[number] = dict(_fields(_bytes(value)))
    if not pieces or len(specs) < 2:
        raise ValueError("pieces, trainer or normaliser are missing")
    trainer, normaliser = specs[2], specs[3]
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise UsageError("the model is neither unigram nor BPE, which is not honoured here.")
    if trainer.get(24, 0) or not normaliser.get(5, 1):
        raise UsageError("spaces stand after words or for themselves, which is not honoured here.")
    if len({piece.text for piece in pieces}) < len(pieces):
        raise ValueError("a piece stands there twice")
    if sum(piece.kind is Kind.UNKNOWN for piece in pieces) != 1:
        raise ValueError("it needs one unknown piece")
    has_bytes = bool(trainer.get(35, 0))
    if has_bytes and sum(piece.kind is Kind.BYTE for piece in pieces) != 256:
        raise ValueError("it needs 256 bytes")
    charsmap = _bytes(normaliser.get(2, b""))
    if charsmap:
        _check_charsmap(charsmap)
    return SentencePieceModel(
        tuple(pieces),
        kind == _BPE,
        has_bytes,
        charsmap,
        begins_with_space=bool(normaliser.get(3, 1)),
        removes_spaces=bool(normaliser.get(4, 1)),
    )


def _piece(value: int | bytes) -> Piece:
    fields = dict(_fields(_bytes(value)))
    text = _bytes(fields.get(1, b"")).decode()
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    if not text or not math.isfinite(score):
        raise ValueError("a piece without text or score")
    return Piece(text, score, Kind(fields.get(3, Kind.NORMAL)))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the number and value of each field: integers, or bytes of everything else.

    Source: protobuf.dev/programming-guides/encoding.
    """
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(content, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"no field begins at byte {at}")
        if size > len(content) - at:
            raise ValueError("it ends too early")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise ValueError("it ends too early")
        value |= (content[at] & 0x7F) << shift
        at += 1
        if content[at - 1] < 0x80:
            return value, at
    raise ValueError(f"no number ends at byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _check_charsmap(charsmap: bytes) -> None:
    """Refuses a table that leads out of itself.

    It is the size of a double-array trie in bytes, the trie (s-yata/darts-clone, units of 32
    bits), and the texts that its values point to. Whoever follows it does not look where it goes.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 8 or not size or size % 4 or size > len(charsmap) - 4:
        raise ValueError("the size of its table of characters is wrong")
    units_U = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(charsmap[4 + size :], np.uint8)
    charsmap[4 + size :].decode()  # that Rust may take it for text
    labels_C = np.arange(1, 256)
    seen_U = np.zeros(len(units_U), bool)
    places_N = np.zeros(1, np.int64)  # of units, the first of which is the root
    while len(places_N):
        unit_N = units_U[places_N]
        below_N = places_N ^ (unit_N >> 10 << ((unit_N & 512) >> 6))
        if (below_N | 255).max() >= len(units_U):
            raise ValueError("its table of characters leads out of itself")
        value_N = units_U[below_N[(unit_N & 256) > 0]] & 0x7FFFFFFF
        if len(value_N) and value_N.max() >= len(texts):
            raise ValueError("its table of characters leads out of itself")
        if np.any(texts[value_N] & 0xC0 == 0x80):
            raise ValueError("its table of characters leads into a character")
        found_NC = below_N[:, None] ^ labels_C
        is_child_NC = units_U[found_NC] & 0x800000FF == labels_C
        places_N = np.unique(found_NC[is_child_NC])
        places_N = places_N[~seen_U[places_N]]
        seen_U[places_N] = True
