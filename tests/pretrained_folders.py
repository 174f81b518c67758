"""Small pretrained models in the format of the Hugging Face Hub, for what begins with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from builders import COMMON, WORDS

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_bert(folder: Path, *, seed: int = 0, positions: int = 64, **options: Any) -> Path:
    """Writes a randomly drawn BERT of two layers, whose tokens are the words of ``builders``."""
    import transformers

    words = [*SPECIAL, *COMMON, *(word for kind in WORDS.values() for word in kind)]
    config = transformers.BertConfig(
        **{
            "vocab_size": len(words),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": positions,
            "hidden_dropout_prob": 0.05,
            "attention_probs_dropout_prob": 0.02,
            **options,
        }
    )
    torch.manual_seed(seed)
    transformers.BertModel(config).save_pretrained(folder)
    write_tokenizer(folder, words)
    return folder


def write_tokenizer(folder: Path, words: list[str]) -> None:
    """Writes a tokenizer of whole words that puts ``[CLS]`` and ``[SEP]`` around texts."""
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("cls", "sep", "pad", "unk", "mask")}
    content = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


BEGIN, PADDING, END, UNKNOWN = range(4)
NAMES = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
LANGUAGES = {"m2m_100": ("__de__", "__en__"), "mbart": ("de_DE", "en_XX")}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.1,
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 16,
    "num_layers": 1,
    "num_heads": 2,
    "d_ff": 48,
    "decoder_start_token_id": PADDING,
}
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
# Class of the configuration, class of the model, sizes, what surrounds a text.
TEXT_MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5, "$A </s>"),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART, "<s> $A </s>"),
    "marian": (
        "MarianConfig",
        "MarianMTModel",
        {**_BART, "decoder_start_token_id": PADDING},
        "$A </s>",
    ),
    "m2m_100": ("M2M100Config", "M2M100ForConditionalGeneration", _BART, "$A </s>"),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _BART, "$A </s>"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA, "<s> $A"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2, "$A"),
}


def write_text_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """Writes a randomly drawn model that writes texts, of the words of ``builders``."""
    import transformers

    config_class, model_class, sizes, template = TEXT_MODELS[kind]
    special = (*NAMES.values(), *LANGUAGES.get(kind, ()))
    words = [*special, *COMMON, *(word for some in WORDS.values() for word in some)]
    numbers = {f"{name}_token_id": i for i, name in enumerate(("bos", "pad", "eos"))}
    options = {**numbers, "vocab_size": len(words), **sizes}
    config = getattr(transformers, config_class)(**options)
    torch.manual_seed(seed)
    getattr(transformers, model_class)(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template != "$A":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template,
            pair=f"{template} {template.replace('$A', '$B')}",
            special_tokens=[("<s>", BEGIN), ("</s>", END)],
        )
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {f"{name}_token": token for name, token in NAMES.items()}
    content["tokenizer_class"] = "MBartTokenizer" if kind == "mbart" else "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder
