"""Small SentencePiece models, and the folders that families of models keep them in."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

_SYLLABLES = ("ba", "ko", "ri", "tu", "ne", "la", "shi", "é", "über", "ça", "1", "22", "tion")
# What the trainers of T5, fairseq and Llama were told.
T5_NUMBERS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "vocab_size": 480,
}
GEMMA: dict[str, Any] = {
    **LLAMA,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
    "add_dummy_prefix": False,
    "user_defined_symbols": ["<mask>", "\n\n"],
}


def train(seed: int = 0, **options: Any) -> bytes:
    """Returns a SentencePiece model of made-up words."""
    import sentencepiece

    chance = random.Random(seed)
    words = ["".join(chance.choices(_SYLLABLES, k=chance.randint(1, 4))) for _ in range(200)]
    lines = [" ".join(chance.choices(words, k=6)) + chance.choice(".!?") for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "東京は大きい"]),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        num_threads=1,
        character_coverage=0.999,
        **{"vocab_size": 200, **options},
    )
    return model.getvalue()


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_marian(folder: Path, languages: tuple[str, ...] = ()) -> None:
    """Writes two SentencePiece models and the one vocabulary of both."""
    import sentencepiece

    pieces = dict[str, None]()
    for seed, name in enumerate(("source.spm", "target.spm")):
        content = train(seed)
        (folder / name).write_bytes(content)
        read = sentencepiece.SentencePieceProcessor(model_proto=content)
        pieces |= dict.fromkeys(read.id_to_piece(i) for i in range(3, len(read)))
    tokens = ["</s>", "<unk>", *sorted(pieces), *languages, "<pad>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write_json(folder / "config.json", {"model_type": "marian"})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "MarianTokenizer"})


def write_m2m100(folder: Path) -> None:
    """Writes a SentencePiece model and a vocabulary that orders its pieces otherwise."""
    import sentencepiece

    content = train()
    (folder / "sentencepiece.bpe.model").write_bytes(content)
    read = sentencepiece.SentencePieceProcessor(model_proto=content)
    pieces = sorted(read.id_to_piece(i) for i in range(3, len(read)))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *pieces]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write_json(folder / "config.json", {"model_type": "m2m_100"})
