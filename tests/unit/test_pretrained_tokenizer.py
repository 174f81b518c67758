"""Tokenizers of pretrained folders cut texts as in transformers, whatever files they are in."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from hasten.core.errors import DamagedError, HastenError, UsageError
from hasten.data.pretrained_tokenizer import PretrainedTokenizers, read_tokenizers
from hasten.data.template import Template, read_template
from pretrained_folders import write_text_model
from sentencepiece_folders import (
    GEMMA,
    LLAMA,
    T5_NUMBERS,
    train,
    write_json,
    write_m2m100,
    write_marian,
)

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

WORDS = ("bako", "ritu", "tion", "Über", "é", "e\u0301", "1", "22", "333", ".", "?!", "don't")
SPACES = (" ", "  ", "   ", "\n", "\t", "\u3000")
OTHERS = ("東京", "大", "ﬁ", "Ⅷ", "２", "🙂", "👩\u200d👧", "ё", "𝒳")
TEXTS = st.lists(st.sampled_from((*WORDS, *SPACES, *OTHERS)), max_size=12).map("".join)
PLAIN = st.lists(st.sampled_from(("bako", "ritu", "Über", "é", "22", "?!", "東京", "🙂"))).map(
    " ".join
)


def write_words(folder: Path, model_type: str = "bert", **options: Any) -> None:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    parts = ("bako", "ritu", "##tu", "ri", "tion", "uber", "Über", "e", "é", "1", "22", "##2", "東")
    others = ("don", "'", "t", ".", "?", "!", "大", "a", "##b")
    (folder / "vocab.txt").write_text("\n".join((*special, *parts, *others)) + "\n")
    write_json(folder / "config.json", {"model_type": model_type})
    write_json(folder / "tokenizer_config.json", options)


def write_bytes(folder: Path, model_type: str, special: list[str], **options: Any) -> None:
    made = ByteLevelBPETokenizer()
    texts = ["bako ritu tion Über 22 333 don't 東京"] * 9
    made.train_from_iterator(texts, vocab_size=300, special_tokens=special, show_progress=False)
    made.save_model(str(folder))
    write_json(folder / "config.json", {"model_type": model_type})
    write_json(folder / "tokenizer_config.json", options)


def write_pieces(folder: Path, file: str, name: str, trained: dict[str, Any], **options: Any):
    (folder / file).write_bytes(train(**trained))
    write_json(folder / "config.json", {"model_type": "llama"})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": name, **options})


FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SHIFTED, T5_FILE, LLAMA_FILE = "sentencepiece.bpe.model", "spiece.model", "tokenizer.model"
FOLDERS: dict[str, Callable[[Path], None]] = {
    "bert": write_words,
    "bert cased": lambda f: write_words(f, do_lower_case=False),
    "bert accents": lambda f: write_words(f, strip_accents=False, tokenize_chinese_chars=False),
    "distilbert": lambda f: write_words(f, "distilbert"),
    "electra": lambda f: write_words(f, "electra"),
    "gpt2": lambda f: write_bytes(f, "gpt2", ["<|endoftext|>"]),
    "gpt2 begins": lambda f: write_bytes(f, "gpt2", ["<|endoftext|>"], add_bos_token=True),
    "roberta": lambda f: write_bytes(f, "roberta", FAIRSEQ),
    "bart": lambda f: write_bytes(f, "bart", FAIRSEQ, add_prefix_space=True),
    "t5": lambda f: write_pieces(f, T5_FILE, "T5Tokenizer", T5_NUMBERS),
    "mt5": lambda f: write_pieces(f, T5_FILE, "T5Tokenizer", T5_NUMBERS, extra_ids=0),
    "xlm-roberta": lambda f: write_pieces(f, SHIFTED, "XLMRobertaTokenizer", {}),
    "mbart": lambda f: write_pieces(f, SHIFTED, "MBartTokenizer", {}),
    "mbart50": lambda f: write_pieces(f, SHIFTED, "MBart50Tokenizer", {}),
    "nllb": lambda f: write_pieces(f, SHIFTED, "NllbTokenizer", {"model_type": "bpe"}),
    "marian": write_marian,
    "m2m_100": write_m2m100,
    "llama": lambda f: write_pieces(f, LLAMA_FILE, "LlamaTokenizer", LLAMA, add_bos_token=True),
    "gemma": lambda f: write_pieces(f, LLAMA_FILE, "GemmaTokenizer", GEMMA, add_bos_token=True),
}
# Classes of transformers 5 that leave out what their SentencePiece models do with spaces, or with
# characters that are not in normal form. We do as the models, with which was trained.
SIMPLIFIED = ("mbart", "mbart50", "nllb", "llama")
PLACE = TemporaryDirectory()  # removed at the end
CODED = ("mbart", "mbart50", "nllb", "m2m_100")


@cache
def folder_of(name: str) -> Path:
    folder = Path(PLACE.name, name)
    folder.mkdir()
    FOLDERS[name](folder)
    return folder


@cache
def both(name: str) -> tuple[Any, PretrainedTokenizers]:
    folder = folder_of(name)
    return transformers.AutoTokenizer.from_pretrained(folder), read_tokenizers(folder)


@cache
def model_of(trained: tuple[tuple[str, Any], ...]) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=train(**dict(trained)))


def ids_of(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return tokenizer.encode(*texts).ids


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=80)
@given(data=st.data())
def test_texts_are_cut_as_in_transformers(name: str, data: st.DataObject):
    theirs, ours = both(name)
    text = data.draw(PLAIN if name in SIMPLIFIED else TEXTS)
    tokenizer = ours.tokenizers[0]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == theirs(text, add_special_tokens=False).input_ids
    decoded = tokenizer.decode(ids)
    unknown = ours.token_id("unk_token")
    if unknown not in ids or unknown == ours.token_id("eos_token"):
        assert decoded == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize("name", ["xlm-roberta", *SIMPLIFIED])
@given(text=TEXTS)
def test_texts_are_cut_as_by_their_models(name: str, text: str):
    _, ours = both(name)
    trained = {"nllb": {"model_type": "bpe"}, "llama": LLAMA}.get(name, {})
    model = model_of(tuple(trained.items()))
    expected = model.encode(text)
    if name != "llama":  # fairseq: <unk> is 3, and all other pieces move by one
        expected = [3 if i == model.unk_id() else i + 1 for i in expected]
    assert ours.tokenizers[0].encode(text, add_special_tokens=False).ids == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_texts_are_surrounded_as_in_transformers(name: str):
    theirs, ours = both(name)
    tokenizer = ours.tokenizers[0]
    if name in CODED:
        assert read_template(tokenizer) == Template()
        return
    one, two = "bako ritu", "tion 22"
    assert ids_of(tokenizer, one) == theirs(one).input_ids
    assert ids_of(tokenizer, one, two) == theirs(one, two).input_ids
    read_template(tokenizer)  # refuses what it does not understand


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_have_the_names_and_numbers_of_transformers(name: str):
    theirs, ours = both(name)
    for key, token in theirs.special_tokens_map.items():
        # What transformers adds to a vocabulary that has it not has no row in the embedding.
        if key.endswith("_token") and theirs.convert_tokens_to_ids(token) < theirs.vocab_size:
            assert ours.names[key] == token
            assert ours.token_id(key) == theirs.convert_tokens_to_ids(token)
    assert {"eos_token", "sep_token"} & {*ours.names}


def test_languages_have_the_numbers_that_the_models_were_trained_with():
    for name, count in (("mbart", 25), ("mbart50", 52), ("m2m_100", 100), ("nllb", 202)):
        theirs, ours = both(name)
        tokenizer = ours.tokenizers[0]
        assert len(ours.languages) == count
        if name == "m2m_100":
            numbers = [theirs.get_lang_id(code.strip("_")) for code in ours.languages]
        elif name == "nllb":  # after the pieces, in their order; <mask> comes last
            first = tokenizer.get_vocab_size() - count - 1
            numbers = list(range(first, first + count))
            assert ours.token_id("mask_token") == first + count
        else:
            numbers = theirs.convert_tokens_to_ids(list(ours.languages))
        assert [tokenizer.token_to_id(code) for code in ours.languages] == numbers
    assert both("t5")[1].languages == both("marian")[1].languages == ()


@given(text=TEXTS)
def test_marian_has_one_vocabulary_for_both_sides(text: str):
    theirs, ours = both("marian")
    source, target = ours.tokenizers
    assert ids_of(target, text) == theirs(text_target=text).input_ids
    for number in range(theirs.vocab_size):
        # A model may write pieces of the other side: they are shown without their mark.
        shown = theirs.convert_ids_to_tokens(number).replace("▁", " ")
        if number not in theirs.all_special_ids:
            for tokenizer in (source, target):
                end = [number, number]
                assert tokenizer.decode(end) == (shown + shown).removeprefix(" ")
    assert source.get_vocab_size() == target.get_vocab_size() == theirs.vocab_size


def test_marian_reads_the_language_to_write_in(tmp_path: Path):
    write_marian(tmp_path, (">>fra<<", ">>deu<<"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (source, _) = read_tokenizers(tmp_path).tokenizers
    for text in (">>deu<< bako ritu", ">>fra<<bako", "bako"):
        assert ids_of(source, text) == theirs(text).input_ids


@pytest.mark.parametrize("name", FOLDERS)
def test_names_of_special_tokens_in_a_text_are_text(name: str):
    _, ours = both(name)
    for tokenizer in ours.tokenizers:
        for token in set(ours.names.values()):
            ids = tokenizer.encode(f"ba {token} ko", add_special_tokens=False).ids
            allowed = {ours.token_id("unk_token")}
            special = {ours.token_id(key) for key in ours.names} - allowed
            assert not special.intersection(ids)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_read_is_read_again_from_tokenizer_json(name: str, tmp_path: Path):
    _, ours = both(name)
    ours.tokenizers[-1].save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", dict(ours.names))
    again = read_tokenizers(tmp_path)
    text = "bako  ritu Über 東京 333 </s>🙂"
    assert ids_of(again.tokenizers[0], text) == ids_of(ours.tokenizers[-1], text)
    assert (again.names, again.languages) == (ours.names, ours.languages)


# Names


def test_names_are_read_from_all_files_that_say_them(tmp_path: Path):
    write_text_model(tmp_path, "bart")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "tokenizer_config.json").unlink()
    # The class of no tokenizer is said: what config.json numbers.
    assert read_tokenizers(tmp_path).names == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    write_json(tmp_path / "special_tokens_map.json", {"unk_token": {"content": "<unk>"}})
    assert read_tokenizers(tmp_path).names["unk_token"] == "<unk>"
    # One that says there is none is believed; one that is no token is none.
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": None, "mask_token": "<mask>"})
    assert {"bos_token", "mask_token"}.isdisjoint(read_tokenizers(tmp_path).names)
    write_json(tmp_path / "config.json", {**config, "eos_token_id": [2, 3], "pad_token_id": 10**9})
    found = read_tokenizers(tmp_path)
    assert found.token_id("eos_token") == 2 and found.token_id("pad_token") is None


def test_a_class_says_its_names(tmp_path: Path):
    write_text_model(tmp_path, "bart")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "BartTokenizerFast"})
    names = read_tokenizers(tmp_path).names
    assert (names["sep_token"], names["cls_token"]) == ("</s>", "<s>")
    assert "mask_token" not in names


def test_tokens_added_later_have_their_numbers(tmp_path: Path):
    FOLDERS["gpt2"](tmp_path)
    size = read_tokenizers(tmp_path).tokenizers[0].get_vocab_size()
    write_json(tmp_path / "added_tokens.json", {"<pad>": size})
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": "<pad>"})
    added = {"content": "<new>", "special": False, "lstrip": False, "rstrip": False}
    config = {"added_tokens_decoder": {str(size + 1): added}}
    write_json(tmp_path / "tokenizer_config.json", config)
    found = read_tokenizers(tmp_path)
    assert found.token_id("pad_token") == size
    assert ids_of(found.tokenizers[0], "<new>") == [size + 1]
    config["added_tokens_decoder"] = {str(size + 2): added}
    write_json(tmp_path / "tokenizer_config.json", config)
    with pytest.raises(DamagedError, match=f"<new> should be token {size + 2}"):
        read_tokenizers(tmp_path)


# Bad input


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path):
    write_json(tmp_path / "config.json", {"model_type": "roberta"})
    with pytest.raises(UsageError, match=r"vocab\.json and merges\.txt of a RobertaTokenizer"):
        read_tokenizers(tmp_path)


@pytest.mark.parametrize("said", [{"tokenizer_class": "XLNetTokenizer"}, {}])
def test_a_class_that_is_not_covered_says_the_way_out(said: dict[str, str], tmp_path: Path):
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    write_json(tmp_path / "tokenizer_config.json", said)
    name = said.get("tokenizer_class", "the tokenizer of qwen2")
    with pytest.raises(UsageError, match=rf"{name} is not read.*save_pretrained\(F\)"):
        read_tokenizers(tmp_path)


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=30)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(name: str, data: st.DataObject):
    with TemporaryDirectory() as place:
        folder = copytree(folder_of(name), Path(place), dirs_exist_ok=True)
        file = data.draw(st.sampled_from(sorted(folder.iterdir())))
        content = file.read_bytes()
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        check_refused_or_read(folder)


def check_refused_or_read(folder: Path) -> None:
    try:
        found = read_tokenizers(folder)
    except HastenError as error:
        assert len(str(error).splitlines()) == 1
        return
    ids_of(found.tokenizers[0], "bako 東京 ﬁ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"<unk>": 0, "a": 0}, "two tokens have one number"),
        ({"<unk>": 0, "a": 10**9}, "not tokens with their numbers"),
        ({"<unk>": 0, "a": True}, "not tokens with their numbers"),
        ({"a": 0}, "there is no <unk>"),
        ({"<unk>": 0}, "has no </s>"),
    ],
)
def test_vocabularies_that_cannot_be_are_refused(content: Any, said: str, tmp_path: Path):
    write_marian(tmp_path)
    write_json(tmp_path / "vocab.json", content)
    with pytest.raises(DamagedError, match=said):
        read_tokenizers(tmp_path)
