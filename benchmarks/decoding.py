"""Greedy decoding of Multi30k: hasten's batched decoding with a cache against one at a time.

    1,000 sources -+-> decode_sequences: like lengths together, keys and values cached  -+-> seconds
                   `-> one by one: the whole decoder on all tokens so far, each step    -+   ratio

Both decode with the same model in one process, in turn, and must give the same tokens. Where they
differ, the scores of the two tokens are compared: in float32 nearly equal ones may change places;
a larger gap ends this program with an error. The plain way encodes a source once and scores only
its last token, so that what is compared is the decoder.

The model has random weights unless ``--run`` names a run of translation, and is then made to write
as many tokens as the reference has, since it does not know when to end.

    python benchmarks/decoding.py [--run FOLDER] [--sentences 1000] [--output FILE]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import (
    MULTI30K,
    available_threads,
    describe_machine,
    keep,
    medians,
    missing,
    say,
    skip,
)
from torch import Tensor

from hasten.core.batch import PackedBatch, SequenceLayout
from hasten.data.packing import pack_texts
from hasten.data.tokenizer import special_token_ids, train_tokenizer
from hasten.data.tokens import EncodedText, EncodingFormat, begin_id, encode_texts, end_id
from hasten.model.heads import TokenOutputs
from hasten.model.search import DecodingSettings
from hasten.model.transformer import Transformer
from hasten.task.contract import Machine
from hasten.task.generating import OutputRules, decode_sequences
from hasten.training.saved import load_model

TEST = "test_2016_flickr"
MAX_LENGTH = 512
MAX_NEW_TOKENS = 128  # of a trained model, which ends by itself; references have at most 60
TARGET_RATIO = 3
LARGEST_TIE = 1e-3
NUM_WARMUP = 4

Tokens = tuple[int, ...]


class Work(NamedTuple):
    """What is decoded.

    Attributes:
        model: an encoder-decoder, in evaluation mode.
        sources: tokens of each source.
        limits: most new tokens of each, the end token included.
        begin: token that an output begins with.
        end: token that ends it; it is banned where ``ends`` is false.
        ends: whether the model decides where to end.
        banned: tokens never to be chosen.
    """

    model: Transformer
    sources: list[EncodedText]
    limits: list[int]
    begin: int
    end: int
    ends: bool
    banned: list[int]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=MULTI30K, help="folder with the test files")
    parser.add_argument("--run", type=Path, help="run folder of a trained translation model")
    parser.add_argument("--sentences", type=int, default=1000, help="a random choice if fewer")
    parser.add_argument("--rounds", type=int, default=1, help="of both, in turn")
    parser.add_argument("--num-layers", type=int, default=3, help="of encoder and of decoder")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=1, help="of random weights")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    files = [arguments.data / f"{name}.{side}" for name in ("train", TEST) for side in ("en", "de")]
    if reason := missing(files):
        skip("decoding", reason, arguments.output)
        return
    torch.set_num_threads(arguments.threads)
    work = trained_work(arguments) if arguments.run else random_work(arguments)
    rounds = [run_round(work, number) for number in range(arguments.rounds)]
    middle = medians([round_["figures"] for round_ in rounds])
    result = {
        "benchmark": "decoding",
        "num_sentences": len(work.sources),
        "weights": "trained" if arguments.run else "random",
        "model": {
            name: getattr(work.model.config, name)
            for name in ("num_layers", "decoder_layers", "hidden_size", "num_heads", "vocab_size")
        },
        "rounds": rounds,
        "medians": middle,
        "ratio": middle["plain_seconds"] / middle["hasten_seconds"],
        "target_ratio": TARGET_RATIO,
        "machine": describe_machine(arguments.threads),
    }
    print_table(result)
    keep(result, arguments.output)
    worst = max(round_["figures"]["largest_gap"] for round_ in rounds)
    if worst > LARGEST_TIE:
        sys.exit(f"the two differ where scores are {worst:.4f} apart: that is no rounding")


def random_work(arguments: argparse.Namespace) -> Work:
    """Returns work for a model with random weights, which ends where its reference does."""
    texts = [line for side in ("en", "de") for line in read_lines(arguments.data / f"train.{side}")]
    tokenizer = train_tokenizer(texts, vocab_size=arguments.vocab_size)
    sources, targets = chosen_pairs(arguments)
    form = EncodingFormat(max_length=MAX_LENGTH, end_token=True)
    encoded, references = (
        encode_texts(tokenizer, [(text,) for text in side], form) for side in (sources, targets)
    )
    torch.manual_seed(arguments.seed)
    model = Transformer(
        vocab_size=tokenizer.get_vocab_size(),
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        num_heads=arguments.num_heads,
        dropout=0.0,
        architecture="encoder_decoder",
        head="language_modelling",
        norm="rmsnorm",
        bias=False,
        max_positions=MAX_LENGTH,
        # Otherwise a random model only repeats its last token, whatever attention sees.
        tie_embeddings=False,
        initializer_std=0.1,
    )
    return Work(
        model=model.eval(),
        sources=encoded,
        limits=[len(reference.token_ids) for reference in references],
        begin=begin_id(tokenizer),
        end=end_id(tokenizer),
        ends=False,
        banned=special_token_ids(tokenizer),
    )


def trained_work(arguments: argparse.Namespace) -> Work:
    """Returns work for the model of a run, which ends by itself."""
    saved = load_model(arguments.run / "model")
    tokenizers = saved.task.tokenizers
    end = end_id(tokenizers[-1])
    form = EncodingFormat(max_length=saved.model.config.max_positions, end_token=True)
    texts = [(text,) for text in chosen_pairs(arguments)[0]]
    limit = min(MAX_NEW_TOKENS, saved.model.config.max_positions)
    return Work(
        model=saved.model,
        sources=encode_texts(tokenizers[0], texts, form),
        limits=[limit] * len(texts),
        begin=begin_id(tokenizers[-1]),
        end=end,
        ends=True,
        banned=[token for token in special_token_ids(tokenizers[-1]) if token != end],
    )


def chosen_pairs(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Returns sources and references of the test files, a random choice where fewer are wanted."""
    sources, targets = (read_lines(arguments.data / f"{TEST}.{side}") for side in ("en", "de"))
    rows = list(range(len(sources)))
    if arguments.sentences < len(rows):
        rows = sorted(random.Random(0).sample(rows, arguments.sentences))
    return [sources[i] for i in rows], [targets[i] for i in rows]


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def run_round(work: Work, number: int) -> dict[str, Any]:
    """Decodes everything both ways and compares."""
    few = work._replace(sources=work.sources[:NUM_WARMUP], limits=work.limits[:NUM_WARMUP])
    found: dict[str, list[Tokens]] = {}
    seconds: dict[str, float] = {}
    arms: dict[str, Callable[[Work], list[Tokens]]]
    arms = {"hasten": decode_batched, "plain": decode_one_by_one}
    for name, decode in arms.items():
        decode(few)
        start = time.perf_counter()
        found[name] = decode(work)
        seconds[name] = time.perf_counter() - start
        say(f"round {number + 1}, {name}: {seconds[name]:.1f} s")
    mismatches = [
        mismatch(work, i, hasten, plain)
        for i, (hasten, plain) in enumerate(zip(found["hasten"], found["plain"], strict=True))
        if hasten != plain
    ]
    num_tokens = sum(map(len, found["plain"]))
    figures = {
        "hasten_seconds": seconds["hasten"],
        "plain_seconds": seconds["plain"],
        "ratio": seconds["plain"] / seconds["hasten"],
        "num_tokens": num_tokens,
        "num_distinct_tokens": len(set().union(*found["plain"])),
        "longest_output": max(map(len, found["plain"])),
        "num_different": len(mismatches),
        "largest_gap": max((entry["gap"] for entry in mismatches), default=0.0),
    }
    return {"figures": figures, "different": mismatches}


def decode_batched(work: Work) -> list[Tokens]:
    """Decodes as hasten does: batched by length, with a cache."""
    found = decode_sequences(
        work.model,
        Machine(torch.device("cpu")),
        DecodingSettings(max_new_tokens=max(work.limits)),
        prompts=[[work.begin]] * len(work.sources),
        sources=work.sources,
        limits=work.limits,
        rules=OutputRules(
            end_ids=frozenset({work.end}) if work.ends else frozenset(), banned_ids=work.banned
        ),
    )
    return [hypotheses[0].token_ids for hypotheses in found]


def decode_one_by_one(work: Work) -> list[Tokens]:
    """Decodes one source after the other, each step anew from its first token."""
    return [decode_plainly(work, number) for number in range(len(work.sources))]


@torch.inference_mode()
def decode_plainly(work: Work, number: int) -> Tokens:
    source = pack_texts([work.sources[number]])
    memory_MD = work.model.encode(source)
    found: Tokens = ()
    while len(found) < work.limits[number]:
        token = int(next_scores(work, found, source, memory_MD).argmax())
        if token == work.end:
            break
        found = (*found, token)
    return found


def next_scores(work: Work, found: Tokens, source: PackedBatch, memory_MD: Tensor) -> Tensor:
    """Returns the scores (V,) of the token after ``found``, by a forward over all of it."""
    ids = [work.begin, *found]
    batch = replace(pack_texts([EncodedText(ids, [0] * len(ids), 0)]), source=source)
    assert work.model.decoder is not None
    x_ND = work.model.decoder(work.model.embed(batch), batch, memory_MD)
    outputs = work.model.score(x_ND[-1:], SequenceLayout.from_lengths([1]))
    assert isinstance(outputs, TokenOutputs)
    scores_V = outputs.scores()[0]
    scores_V[work.banned] = -torch.inf
    return scores_V


@torch.inference_mode()
def mismatch(work: Work, number: int, hasten: Tokens, plain: Tokens) -> dict[str, Any]:
    """Returns where two outputs part, and how far apart the plain way scores the two tokens."""
    ended = [(*tokens, work.end) for tokens in (hasten, plain)]
    place = next(i for i, (a, b) in enumerate(zip(*ended, strict=False)) if a != b)
    source = pack_texts([work.sources[number]])
    scores_V = next_scores(work, plain[:place], source, work.model.encode(source))
    gap = scores_V[ended[1][place]] - scores_V[ended[0][place]]
    return {"sentence": number, "token": place, "gap": gap.item()}


def print_table(result: dict[str, Any]) -> None:
    middle = result["medians"]
    print(
        f"{result['num_sentences']:,} sentences, {middle['num_tokens']:,.0f} tokens, "
        f"{result['weights']} weights; medians of {len(result['rounds'])} round(s)"
    )
    for name, key in (("batched, cached", "hasten"), ("one by one", "plain")):
        seconds = middle[f"{key}_seconds"]
        print(f"{name:16} {seconds:8.1f} s {middle['num_tokens'] / seconds:10,.0f} tokens/s")
    print(
        f"ratio {result['ratio']:.2f} (wanted: {TARGET_RATIO} or more); outputs that differ: "
        f"{middle['num_different']:.0f}, by scores at most {middle['largest_gap']:.1e} apart"
    )


if __name__ == "__main__":
    main()
