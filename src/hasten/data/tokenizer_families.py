"""Tokenizers from the files that families of models had before tokenizer.json.

    vocab.txt                      words and their parts     BERT, DistilBERT, ELECTRA
    vocab.json, merges.txt         bytes joined in pairs     GPT-2, RoBERTa, BART
    *.model, *.spm [, vocab.json]  SentencePiece             the others

Each puts around texts what its class in transformers does; what goes with codes of languages is
left to whoever knows the languages. Where transformers 5 differs from SentencePiece (spaces at
the beginning for Llama, characters that are not in normal form for mBART), SentencePiece is
right: the models were trained with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from hasten.core.errors import DamagedError, UsageError
from hasten.core.files import read_object
from hasten.data.languages import M2M100, MBART, MBART_50, NLLB, WMT21
from hasten.data.sentencepiece import (
    Kind,
    Piece,
    SentencePieceModel,
    build_tokenizer,
    read_sentencepiece,
)


@dataclass(frozen=True)
class Described:
    """A folder without tokenizer.json.

    Attributes:
        path: of the folder.
        config: tokenizer_config.json; empty without one.
        names: special tokens by transformers' names, whether there are such tokens or not.
    """

    path: Path
    config: Mapping[str, Any]
    names: Mapping[str, str]


@dataclass(frozen=True)
class TokenizerFamily:
    """How to read the files of one class of transformers.

    Attributes:
        files: those that there must be.
        names: special tokens that the class has unless its folder says otherwise.
        read: makes the tokenizers: one, or one for the source and one for the target.
    """

    files: tuple[str, ...]
    names: Mapping[str, str]
    read: Callable[[Described], tuple[Tokenizer, ...]]


# Words and bytes


def _word_pieces(said: Described) -> tuple[Tokenizer, ...]:
    file = said.path / "vocab.txt"
    try:
        with file.open(encoding="utf-8") as lines:
            vocab = {line.rstrip("\n"): number for number, line in enumerate(lines)}
    except ValueError as error:
        raise DamagedError(f"{file}: not a list of tokens: {error}.") from None
    unknown, begin, end = (said.names[f"{name}_token"] for name in ("unk", "cls", "sep"))
    for token in (unknown, begin, end):
        if token not in vocab:
            raise DamagedError(f"{file}: there is no {token}.")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=bool(said.config.get("tokenize_chinese_chars", True)),
        strip_accents=said.config.get("strip_accents"),
        lowercase=bool(said.config.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(begin, vocab[begin]), (end, vocab[end])],
    )
    return (tokenizer,)


def _joined_bytes(said: Described) -> Tokenizer:
    file = said.path / "merges.txt"
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        merges = [(left, right) for left, right in pairs]
        vocab = _numbers(said.path / "vocab.json")
        tokenizer = Tokenizer(models.BPE(vocab, merges))
    except DamagedError:
        raise
    except Exception as error:  # the library raises a bare Exception
        raise DamagedError(f"{file}: not the merges of vocab.json: {error}.") from None
    space = bool(said.config.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2(said: Described) -> tuple[Tokenizer, ...]:
    return (_between_ends(_joined_bytes(said), said, begins=False),)


def _roberta(said: Described) -> tuple[Tokenizer, ...]:
    tokenizer = _joined_bytes(said)
    begin, end = said.names["cls_token"], said.names["sep_token"]
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, _number_of(tokenizer, end, said)),
        (begin, _number_of(tokenizer, begin, said)),
        trim_offsets=bool(said.config.get("trim_offsets", True)),
        add_prefix_space=bool(said.config.get("add_prefix_space", False)),
    )
    return (tokenizer,)


# SentencePiece, whose numbers are those of its file


def _own_numbers(said: Described, file: str) -> tuple[SentencePieceModel, list[Piece]]:
    model = read_sentencepiece(said.path / file)
    named = set(said.names.values())
    pieces = [
        piece._replace(kind=Kind.CONTROL)
        if piece.text in named and piece.kind is not Kind.UNKNOWN
        else piece
        for piece in model.pieces
    ]
    return model, pieces


def _t5(said: Described) -> tuple[Tokenizer, ...]:
    model, pieces = _own_numbers(said, "spiece.model")
    known = {piece.text for piece in pieces}
    extra = (f"<extra_id_{i}>" for i in reversed(range(int(said.config.get("extra_ids", 100)))))
    pieces += [Piece(text) for text in extra if text not in known]
    tokenizer = build_tokenizer(model, pieces)
    end = said.names["eos_token"]
    return (_with_template(tokenizer, said, f"$A {end}", f"$A {end} $B {end}"),)


def _llama(said: Described) -> tuple[Tokenizer, ...]:
    model, pieces = _own_numbers(said, "tokenizer.model")
    return (_between_ends(build_tokenizer(model, pieces), said, begins=True),)


# SentencePiece, with the numbers of fairseq: its own four special tokens, the file's other pieces


def _fairseq(said: Described, languages: tuple[str, ...] = ()) -> Tokenizer:
    file = said.path / "sentencepiece.bpe.model"
    model = read_sentencepiece(file)
    if {piece.kind for piece in model.pieces[:3]} != {Kind.UNKNOWN, Kind.CONTROL}:
        raise DamagedError(f"{file}: it does not begin with <unk>, <s> and </s>.")
    begin, pad, end = (said.names[f"{name}_token"] for name in ("bos", "pad", "eos"))
    special = [Piece(begin), Piece(pad), Piece(end)]
    special.append(Piece(said.names["unk_token"], kind=Kind.UNKNOWN))
    last = [Piece(text) for text in (*languages, said.names["mask_token"])]
    known = {piece.text for piece in model.pieces[3:]}
    if known.intersection(piece.text for piece in (*special, *last)):
        raise DamagedError(f"{file}: a special token is one of its pieces.")
    return build_tokenizer(model, [*special, *model.pieces[3:], *last])


def _xlm_roberta(said: Described) -> tuple[Tokenizer, ...]:
    begin, end = said.names["bos_token"], said.names["eos_token"]
    single, pair = f"{begin} $A {end}", f"{begin} $A {end} {end} $B {end}"
    return (_with_template(_fairseq(said), said, single, pair),)


# SentencePiece, with the numbers of a vocab.json


def _numbered(said: Described, pieces: str, vocabulary: str) -> Tokenizer:
    model = read_sentencepiece(said.path / pieces)
    vocab = _numbers(said.path / vocabulary)
    kinds = {piece.text: piece.kind for piece in model.pieces}
    special = {*said.names.values(), *(t for t, kind in kinds.items() if kind is Kind.CONTROL)}
    # What has no text of its own keeps the numbers of the others in their places.
    arranged = [Piece(str(i), kind=Kind.UNUSED) for i in range(max(vocab.values()) + 1)]
    for text, number in vocab.items():
        kind = kinds.get(text, Kind.UNUSED)
        if text == said.names["unk_token"]:
            kind = Kind.UNKNOWN
        elif text in special or kind is Kind.UNKNOWN:
            kind = Kind.CONTROL
        elif text.startswith(">>") and text.endswith("<<"):  # a language of Marian, in texts
            kind = Kind.USER_DEFINED
        arranged[number] = Piece(text, kind=kind)
    if all(piece.kind is not Kind.UNKNOWN for piece in arranged):
        raise DamagedError(f"{said.path / vocabulary}: there is no {said.names['unk_token']}.")
    return build_tokenizer(model, arranged)


def _marian(said: Described) -> tuple[Tokenizer, ...]:
    separate = said.config.get("separate_vocabs", False)
    vocabularies = ("vocab.json", "target_vocab.json" if separate else "vocab.json")
    end = said.names["eos_token"]
    sides = zip(("source.spm", "target.spm"), vocabularies, strict=True)
    read = (_numbered(said, pieces, vocabulary) for pieces, vocabulary in sides)
    return tuple(_with_template(one, said, f"$A {end}", f"$A $B {end}") for one in read)


def _m2m100(said: Described) -> tuple[Tokenizer, ...]:
    codes = WMT21 if said.config.get("language_codes") == "wmt21" else M2M100
    tokenizer = _numbered(said, "sentencepiece.bpe.model", "vocab.json")
    tokenizer.add_special_tokens([AddedToken(f"__{c}__", normalized=False) for c in codes])
    return (tokenizer,)


# What several need


def _numbers(file: Path) -> dict[str, int]:
    vocab = read_object(file)
    numbers = list(vocab.values())
    if not numbers or not all(type(n) is int and 0 <= n < 2 * len(numbers) for n in numbers):
        raise DamagedError(f"{file}: not tokens with their numbers.")
    if len(set(numbers)) < len(numbers):
        raise DamagedError(f"{file}: two tokens have one number.")
    return vocab


def _number_of(tokenizer: Tokenizer, token: str, said: Described) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise DamagedError(f"{said.path}: the tokenizer has no {token}.")
    return number


def _with_template(tokenizer: Tokenizer, said: Described, single: str, pair: str) -> Tokenizer:
    names = {name for name in single.split() if name != "$A"}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(name, _number_of(tokenizer, name, said)) for name in sorted(names)],
    )
    return tokenizer


def _between_ends(tokenizer: Tokenizer, said: Described, *, begins: bool) -> Tokenizer:
    wants_begin = said.config.get("add_bos_token", begins)
    begin = said.names["bos_token"] + " " if wants_begin else ""
    end = " " + said.names["eos_token"] if said.config.get("add_eos_token", False) else ""
    if not begin and not end:
        return tokenizer
    single = f"{begin}$A{end}"
    return _with_template(tokenizer, said, single, f"{single} {single.replace('$A', '$B')}")


def _named(**names: str) -> dict[str, str]:
    return {f"{name}_token": token for name, token in names.items()}


_BERT = TokenizerFamily(
    ("vocab.txt",),
    _named(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]"),
    _word_pieces,
)
_ENDS = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
_ALL = _named(bos="<s>", cls="<s>", sep="</s>", mask="<mask>", **_ENDS)
_ROBERTA = TokenizerFamily(("vocab.json", "merges.txt"), _ALL, _roberta)
_T5 = TokenizerFamily(("spiece.model",), _named(**_ENDS), _t5)
_SHIFTED = ("sentencepiece.bpe.model",)
_GPT2_END = "<|endoftext|>"
_LLAMA = TokenizerFamily(("tokenizer.model",), _named(bos="<s>", eos="</s>", unk="<unk>"), _llama)
_GEMMA_NAMES = _named(bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>", mask="<mask>")
_GEMMA = TokenizerFamily(("tokenizer.model",), _GEMMA_NAMES, _llama)

TOKENIZER_FAMILIES: dict[str, TokenizerFamily] = {
    "BertTokenizer": _BERT,
    "DistilBertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "GPT2Tokenizer": TokenizerFamily(
        ("vocab.json", "merges.txt"),
        _named(bos=_GPT2_END, eos=_GPT2_END, unk=_GPT2_END),
        _gpt2,
    ),
    "RobertaTokenizer": _ROBERTA,
    "BartTokenizer": _ROBERTA,
    "T5Tokenizer": _T5,
    "MT5Tokenizer": _T5,
    "XLMRobertaTokenizer": TokenizerFamily(_SHIFTED, _ALL, _xlm_roberta),
    "MBartTokenizer": TokenizerFamily(_SHIFTED, _ALL, lambda said: (_fairseq(said, MBART),)),
    "MBart50Tokenizer": TokenizerFamily(_SHIFTED, _ALL, lambda said: (_fairseq(said, MBART_50),)),
    "NllbTokenizer": TokenizerFamily(_SHIFTED, _ALL, lambda said: (_fairseq(said, NLLB),)),
    "MarianTokenizer": TokenizerFamily(
        ("source.spm", "target.spm", "vocab.json"), _named(**_ENDS), _marian
    ),
    "M2M100Tokenizer": TokenizerFamily(
        (*_SHIFTED, "vocab.json"), _named(bos="<s>", sep="</s>", **_ENDS), _m2m100
    ),
    "LlamaTokenizer": _LLAMA,
    "GemmaTokenizer": _GEMMA,
}
_OF_MODEL_TYPE = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizer",
    "gpt2": "GPT2Tokenizer",
    "roberta": "RobertaTokenizer",
    "bart": "BartTokenizer",
    "t5": "T5Tokenizer",
    "mt5": "MT5Tokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "mbart": "MBartTokenizer",
    "marian": "MarianTokenizer",
    "m2m_100": "M2M100Tokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
}
# Classes that say no more than that there is a tokenizer.json.
_OF_ANY = ("PreTrainedTokenizer", "TokenizersBackend")


def tokenizer_class(
    folder: Path, config: Mapping[str, Any], model_type: object
) -> tuple[str, TokenizerFamily | None]:
    """Returns the class of a folder's tokenizer and its family; None of one that is not covered.

    Args:
        folder: of the model.
        config: tokenizer_config.json.
        model_type: of config.json.
    """
    said = config.get("tokenizer_class")
    name = str(said).removesuffix("Fast") if said else ""
    if not name or name in _OF_ANY:
        name = _OF_MODEL_TYPE.get(str(model_type), name or f"the tokenizer of {model_type}")
        if name == "M2M100Tokenizer" and not (folder / "vocab.json").is_file():
            name = "NllbTokenizer"
    return name, TOKENIZER_FAMILIES.get(name)


def read_files(name: str, family: TokenizerFamily, said: Described) -> tuple[Tokenizer, ...]:
    """Reads the tokenizers of a folder.

    Raises:
        UsageError: a file is missing.
        DamagedError: a file is damaged.
    """
    missing = [file for file in family.files if not (said.path / file).is_file()]
    if missing:
        raise UsageError(
            f"{said.path}: no tokenizer: neither tokenizer.json nor the {' and '.join(missing)} "
            f"of a {name}."
        )
    return family.read(said)
