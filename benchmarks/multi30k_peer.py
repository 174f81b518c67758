"""The peer of multi30k.py: transformers.Seq2SeqTrainer on the same files, untuned.

    train.en, train.de -> joint BPE -> encoder-decoder from scratch -> Seq2SeqTrainer
                                                                          |
    test_2016_flickr.en ----- greedy generate() <-------------------------+-> BLEU, chrF

The documented way and nothing more: MarianMTModel with freshly drawn weights, dynamic padding,
batch 64, linear decay and AdamW. The trainer's own learning rate (5e-5) is for fine-tuning; 5e-4 is
a usual one from scratch. Linear decay needs to know the number of epochs beforehand, so the pace of
some steps is measured first and the epochs are as many as fit into the given minutes. It prints one
JSON object.

    python benchmarks/multi30k_peer.py FOLDER [--minutes 55 | --epochs 10] [--seed 1]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import MULTI30K, available_threads
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MAX_LENGTH = 128
PROBE_STEPS, PROBE_WARMUP = 40, 10

Examples = list[dict[str, list[int]]]


class Clock(transformers.TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainer."""
        self.times.append(time.perf_counter())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, nargs="?", default=MULTI30K, help="folder of the files")
    parser.add_argument("--minutes", type=float, default=55, help="of training, at most")
    parser.add_argument("--epochs", type=int, help="so many instead of what fits")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=3, help="of encoder and of decoder")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--feed-forward-size", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=available_threads())
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    # The trainer prints its log, and the result must stand alone.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as output:
        result = train_and_test(arguments, output)
    print(json.dumps(result))


def train_and_test(arguments: argparse.Namespace, output: str) -> dict[str, Any]:
    """Trains, translates the test sources and returns every figure."""
    train = [read_lines(arguments.data / f"train.{side}") for side in ("en", "de")]
    test = [read_lines(arguments.data / f"test_2016_flickr.{side}") for side in ("en", "de")]
    tokenizer = train_tokenizer([*train[0], *train[1]], arguments.vocab_size)
    examples = encode(tokenizer, *train)
    start = time.perf_counter()
    epochs = arguments.epochs or epochs_that_fit(arguments, tokenizer, examples, output)
    probe_seconds = time.perf_counter() - start
    trainer = build_trainer(arguments, tokenizer, examples, output, num_train_epochs=epochs)
    start = time.perf_counter()
    trained = trainer.train()
    train_seconds = time.perf_counter() - start
    start = time.perf_counter()
    found = trainer.predict(encode(tokenizer, *test), max_length=MAX_LENGTH, num_beams=1)
    test_seconds = time.perf_counter() - start
    ids = [[token for token in row if token >= 0] for row in found.predictions.tolist()]
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    bleu, chrf = BLEU(force=True), CHRF()
    return {
        "seed": arguments.seed,
        "test_bleu": bleu.corpus_score(texts, [test[1]]).score,
        "test_chrf": chrf.corpus_score(texts, [test[1]]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
        "num_test": len(texts),
        "train_loss": trained.training_loss,
        "test_loss": (found.metrics or {}).get("test_loss"),
        "train_seconds": train_seconds,
        "test_seconds": test_seconds,
        "probe_seconds": probe_seconds,
        "epochs": epochs,
        "steps": trained.global_step,
        "batch_size": arguments.batch_size,
        "learning_rate": trainer.args.learning_rate,
        "vocab_size": len(tokenizer),
        "num_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "samples": [
            f"source: {test[0][i]}\noutput: {texts[i]}\nwanted: {test[1][i]}"
            for i in range(min(3, len(texts)))
        ],
    }


def read_lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def train_tokenizer(texts: Sequence[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """Trains one byte-level BPE for both languages; a sequence ends with </s>."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=size, special_tokens=[PAD, END, UNKNOWN], show_progress=False
    )
    bpe.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, bpe.token_to_id(END))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=MAX_LENGTH,
    )


def encode(tokenizer: Any, sources: list[str], targets: list[str]) -> Examples:
    """Returns examples as the trainer takes them; the collator pads them batch by batch."""
    encoded = tokenizer(sources, text_target=targets, truncation=True)
    keys = ("input_ids", "attention_mask", "labels")
    return [{key: encoded[key][i] for key in keys} for i in range(len(sources))]


def epochs_that_fit(
    arguments: argparse.Namespace,
    tokenizer: Any,
    examples: Examples,
    output: str,
) -> int:
    """Measures the pace of a trainer that is thrown away; at least one epoch fits."""
    clock = Clock()
    trainer = build_trainer(arguments, tokenizer, examples, output, max_steps=PROBE_STEPS)
    trainer.add_callback(clock)
    trainer.train()
    pace = (clock.times[-1] - clock.times[PROBE_WARMUP]) / (PROBE_STEPS - 1 - PROBE_WARMUP)
    per_epoch = math.ceil(len(examples) / arguments.batch_size)
    return max(1, int(60 * arguments.minutes / (pace * per_epoch)))


def build_trainer(
    arguments: argparse.Namespace,
    tokenizer: Any,
    examples: Examples,
    output: str,
    **length: Any,
) -> Any:
    """Returns a trainer with a new model; only what has no default is set."""
    transformers.set_seed(arguments.seed)  # also draws the weights
    model = build_model(arguments, tokenizer)
    return transformers.Seq2SeqTrainer(
        model=model,
        args=transformers.Seq2SeqTrainingArguments(
            output_dir=output,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            predict_with_generate=True,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=arguments.seed,
            learning_rate=arguments.learning_rate,
            **length,
        ),
        train_dataset=examples,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )


def build_model(arguments: argparse.Namespace, tokenizer: Any) -> transformers.MarianMTModel:
    """Draws a model; embeddings are scaled, as in the published Marian models."""
    layers, heads = arguments.num_layers, arguments.num_heads
    model = transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=len(tokenizer),
            d_model=arguments.hidden_size,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=arguments.feed_forward_size,
            decoder_ffn_dim=arguments.feed_forward_size,
            max_position_embeddings=MAX_LENGTH,
            scale_embedding=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            forced_eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config.max_length = MAX_LENGTH
    return model


if __name__ == "__main__":
    main()
