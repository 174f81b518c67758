"""What surrounds texts for a pretrained model is what transformers puts there."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hasten.core.errors import DamagedError
from hasten.data.template import Template, read_template
from hasten.data.tokens import EncodingFormat, encode_texts

WORDS = ["[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "<eos>", *"abcdefgh"]
TEMPLATE = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
)
END = processors.TemplateProcessing(
    single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 5)]
)
BYTES = processors.ByteLevel(trim_offsets=False)
PROCESSORS: dict[str, Any] = {
    "template": TEMPLATE,
    "bert": processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
    "roberta": processors.RobertaProcessing(("</s>", 4), ("<s>", 3)),
    "t5": END,
    "bytes": BYTES,
    "both": processors.Sequence([BYTES, TEMPLATE]),
    "none": None,
}


def tokenizer_with(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if PROCESSORS[name] is not None:
        tokenizer.post_processor = PROCESSORS[name]
    return tokenizer


TEXTS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12).map(" ".join)


@pytest.mark.parametrize("name", PROCESSORS)
@given(first=TEXTS, second=TEXTS)
def test_one_text_and_two_are_encoded_as_the_tokenizer_does(name: str, first: str, second: str):
    tokenizer = tokenizer_with(name)
    template = read_template(tokenizer)
    form = EncodingFormat(template=template)
    assert EncodingFormat.from_json(asdict(form)) == form
    (alone,) = encode_texts(tokenizer, [(first,)], form)
    assert alone.token_ids == tokenizer.encode(first).ids
    assert set(alone.token_types) == {0}
    (both,) = encode_texts(tokenizer, [(first, second)], form)
    expected = tokenizer.encode(first, second)
    assert both.token_ids == expected.ids
    if template.numbers_segments:
        assert both.token_types == expected.type_ids
    else:
        assert set(both.token_types) == {0} and form.has_types is False


@given(first=TEXTS, second=TEXTS, length=st.integers(4, 12))
def test_cutting_spares_what_the_template_adds(first: str, second: str, length: int):
    tokenizer = tokenizer_with("roberta")
    form = EncodingFormat(max_length=length, template=read_template(tokenizer))
    (found,) = encode_texts(tokenizer, [(first, second)], form)
    assert len(found.token_ids) <= length
    assert [i for i in found.token_ids if i < 5] == [3, 4, 4, 4]
    assert found.token_ids[0] == 3 and found.token_ids[-1] == 4


def test_formats_saved_without_a_template_are_read():
    values = asdict(EncodingFormat(class_token=True))
    del values["template"]
    assert EncodingFormat.from_json(values) == EncodingFormat(class_token=True)


def test_a_template_that_contradicts_itself_is_refused():
    tokenizer = tokenizer_with("none")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="$A [SEP] $B", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    with pytest.raises(DamagedError, match="in different ways"):
        read_template(tokenizer)
    tokenizer.post_processor = processors.Sequence([TEMPLATE, END])
    with pytest.raises(DamagedError, match="several post-processors"):
        read_template(tokenizer)


def test_our_own_formats_have_no_template():
    assert EncodingFormat().template is None
    assert Template() == read_template(tokenizer_with("none"))
