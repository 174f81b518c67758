"""Translation: from one text to another, by an encoder and a decoder.

    source, target -> tokens -> encoder(source), decoder(target so far) -> the next target token

Any pair of strings will do: spelling to pronunciation, question to query, long to short.

Shapes: E examples, S sequences, N target tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from hasten.core.batch import PackedBatch
from hasten.core.errors import DataError, UsageError
from hasten.data.augment import Augmentation
from hasten.data.columns import CellError, free_text_columns, resolve_columns, text_of
from hasten.data.corpus import Corpus, Reading
from hasten.data.examples import Examples
from hasten.data.packing import pack_examples, pack_shifted
from hasten.data.redraw import Redraw, redrawn_tokens
from hasten.data.rows import Cell, Row, RowFile
from hasten.data.template import Framing, framing_from_json
from hasten.data.tokenizer import special_token_ids
from hasten.data.tokens import (
    EncodingFormat,
    TokenStore,
    encode_texts,
    open_tokens,
    template_of,
)
from hasten.model.search import DecodingSettings
from hasten.model.transformer import Transformer
from hasten.task.contract import (
    Certainty,
    DecodedSample,
    Drawing,
    Machine,
    PredictSettings,
    Recognised,
    Task,
    TaskSettings,
    WantedColumns,
)
from hasten.task.generating import (
    OutputRules,
    TokenMeter,
    decode_sequences,
    spread,
    token_loss_sum,
)
from hasten.task.text_metrics import translation_metrics

_SHOWN = 3
_SPARE_TOKENS = 10
"""How much longer than the longest target of the training a translation may get."""


class PairedExamples(Examples):
    """Source and target of each row.

    Args:
        corpus: the rows they come from.
        rows: (E,) those of the split.
        sources: tokens of the sources, row for row.
        targets: tokens of the targets, begin and end token included.
        redraws: draw an epoch's sources and targets; None where all epochs have the same.
    """

    def __init__(
        self,
        corpus: Corpus,
        rows: np.ndarray,
        sources: TokenStore,
        targets: TokenStore,
        redraws: tuple[Redraw | None, Redraw | None] = (None, None),
    ) -> None:
        self.corpus, self.rows = corpus, rows
        self.sources, self.targets = sources, targets
        num_targets = targets.lengths[rows] - 1
        self.lengths = sources.lengths[rows] + num_targets
        self.weights = num_targets.astype(np.float64)
        self.num_truncated = sources.num_truncated + targets.num_truncated
        self._redraws = redraws

    def pack(self, examples: np.ndarray, weight: float = 1.0) -> PackedBatch:
        """Packs examples; targets are the next target tokens (N,)."""
        rows = self.rows[examples]
        batch = pack_shifted(
            self.targets,
            self.targets.offsets[rows],
            self.targets.offsets[rows + 1],
            example_ids=examples,
            weight=weight,
        )
        return replace(batch, source=pack_examples(self.sources, rows, example_ids=examples))

    def in_epoch(self, epoch: int) -> Examples:
        """Returns the examples with the tokens of an epoch."""
        source, target = self._redraws
        if source is None and target is None:
            return self
        return PairedExamples(
            self.corpus,
            self.rows,
            self.sources if source is None else source(epoch),
            self.targets if target is None else target(epoch),
            self._redraws,
        )


class Translation(Task):
    """Turns one text into another.

    Args:
        reading: which columns are read, and how.
        tokenizers: one for both sides, or one for the source and one for the target.
        max_length: longest source, and longest target, in tokens.
        label_smoothing: share of each token's target that is spread over the vocabulary.
        longest_target: tokens of the longest target of the training.
        framing: what a pretrained model wants around texts; None for a model of our own.
    """

    name = "translation"
    architecture = "encoder_decoder"
    head = "language_modelling"
    higher_is_better = {  # noqa: RUF012
        "loss": False,
        "perplexity": False,
        "bleu": True,
        "chrf": True,
        "exact_match": True,
        "token_error_rate": False,
    }
    default_metric = "loss"
    decoded_metrics = frozenset({"bleu", "chrf", "exact_match", "token_error_rate"})
    uses = frozenset({"label_smoothing", "max_length", "shared_vocabulary"})
    prediction_columns = ("translation", "score")
    generates = True

    def __init__(
        self,
        reading: Reading,
        tokenizers: tuple[Tokenizer, ...],
        *,
        max_length: int = 512,
        label_smoothing: float = 0.0,
        longest_target: int = 512,
        framing: Framing | None = None,
    ) -> None:
        self.reading, self.tokenizers = reading, tokenizers
        self.max_length, self.label_smoothing = max_length, label_smoothing
        self.longest_target = longest_target
        self._framing = framing
        read, written = (None, None) if framing is None else (framing.read, framing.written)
        self.source_form = EncodingFormat(
            max_length=max_length, end_token=True, cells=(0,), template=read
        )
        # One more than the model's positions: the last token is only ever a target.
        self.target_form = EncodingFormat(
            max_length=max_length + 1,
            class_token=True,
            end_token=True,
            cells=(1,),
            template=written,
        )

    @classmethod
    def recognise(cls, file: RowFile, sample: Sequence[Row]) -> Recognised | None:
        """Takes line-aligned files, named pairs of columns, and two columns of free text."""
        if file.format == "aligned":
            return Recognised(Certainty.FORMAT, "two line-aligned files")
        if named := _named_pair(file.columns, sample):
            return Recognised(Certainty.NAMES, f"columns '{named[0]}' and '{named[1]}'")
        if len(free_text_columns(sample, file.columns)) == 2:
            return Recognised(Certainty.GUESS, "two columns of text, and no column of few values")
        return None

    @classmethod
    def choose_reading(
        cls, file: RowFile, sample: Sequence[Row], wanted: WantedColumns
    ) -> tuple[Reading, tuple[str, ...]]:
        """Chooses the source and the target column by their names, else by their order."""
        if wanted.text or wanted.label:
            raise UsageError("translation has --source and --target columns, and no others.")
        named = [name for name in (wanted.source, wanted.target) if name is not None]
        positions = resolve_columns(file.columns, named)
        if len(named) == 2:
            columns = tuple(file.columns[i] for i in positions)
            return cls.reading_of("pair", columns, None), _reasons(columns, "as asked for")
        columns, reason = _guess_pair(file, sample)
        if named:
            other = next((c for c in columns if c != file.columns[positions[0]]), None)
            if other is None:
                raise DataError(f"{file.display_name}: name both --source and --target.")
            one = file.columns[positions[0]]
            columns = (one, other) if wanted.source is not None else (other, one)
        return cls.reading_of("pair", columns, None), _reasons(columns, reason)

    @classmethod
    def reading_of(cls, form: str, columns: Sequence[str], label: str | None) -> Reading:
        """Reads two texts, stripped of white space, neither of them empty."""
        return Reading(cls.name, form, tuple(columns), None, _read_pair)

    @classmethod
    def tokenizer_texts(
        cls, corpus: Corpus, rows: np.ndarray, reading: Reading, settings: TaskSettings
    ) -> list[Iterator[str]]:
        """Returns the texts of both sides together, or of each by itself."""
        if settings.shared_vocabulary:
            return [itertools.chain.from_iterable(corpus.texts(rows))]
        return [map(itemgetter(side), corpus.texts(rows)) for side in range(2)]

    @classmethod
    def from_data(
        cls,
        corpus: Corpus,
        rows: np.ndarray,
        reading: Reading,
        tokenizers: tuple[Tokenizer, ...],
        settings: TaskSettings,
    ) -> Translation:
        """Builds the task; the longest target of the training bounds what is generated."""
        task = cls(
            reading,
            tokenizers,
            max_length=settings.max_length,
            label_smoothing=settings.label_smoothing,
            framing=settings.framing,
        )
        targets = open_tokens(corpus, tokenizers[-1], task.target_form)
        task.longest_target = int(targets.lengths[rows].max())
        return task

    def examples(
        self, corpus: Corpus, rows: np.ndarray, drawing: Drawing | None = None
    ) -> PairedExamples:
        """Returns the pairs in some rows; of augmentations, targets have BPE-dropout only."""
        sources = open_tokens(corpus, self.tokenizers[0], self.source_form)
        targets = open_tokens(corpus, self.tokenizers[-1], self.target_form)
        if drawing is None:
            return PairedExamples(corpus, rows, sources, targets)
        target_augmentation = Augmentation(bpe_dropout=drawing.augmentation.bpe_dropout)
        sides = (
            (self.tokenizers[0], self.source_form, drawing.augmentation),
            (self.tokenizers[-1], self.target_form, target_augmentation),
        )
        source, target = (
            redrawn_tokens(
                corpus, rows, tokenizer, form, augmentation=augmentation, seed=drawing.seed
            )
            for tokenizer, form, augmentation in sides
        )
        return PairedExamples(corpus, rows, sources, targets, (source, target))

    def model_options(self) -> dict[str, Any]:
        """Returns vocabularies and positions."""
        is_shared = len(self.tokenizers) == 1
        return {
            "vocab_size": self.tokenizers[-1].get_vocab_size(),
            "source_vocab_size": None if is_shared else self.tokenizers[0].get_vocab_size(),
            "max_positions": self.max_length,
            "head": self.head,
        }

    def loss_sum(self, outputs: Any, batch: PackedBatch) -> Tensor:
        """Returns the summed cross-entropy of the target tokens."""
        return token_loss_sum(outputs, batch, self.label_smoothing)

    def new_meter(self, examples: Examples | None = None) -> TokenMeter:
        """Returns an empty meter of the loss, without label smoothing."""
        return TokenMeter(None if examples is None else len(examples))

    def decode(
        self,
        model: Transformer,
        examples: Examples,
        machine: Machine,
        settings: DecodingSettings,
        limit: int | None = None,
    ) -> DecodedSample:
        """Translates sources and compares with their targets."""
        chosen = spread(len(examples), limit)
        pairs = list(examples.corpus.texts(examples.rows[chosen]))
        outputs = self._translate(model, [source for source, _ in pairs], machine, settings)
        found = [
            self._text(hypotheses[0].token_ids) if hypotheses else "" for hypotheses in outputs
        ]
        metrics = translation_metrics(found, [target for _, target in pairs])
        del metrics["num_examples"]
        metrics["num_decoded"] = len(found)
        shown = spread(len(found), _SHOWN).tolist()
        samples = tuple(
            f"source: {pairs[i][0]}\noutput: {found[i]}\nwanted: {pairs[i][1]}" for i in shown
        )
        return DecodedSample(metrics, samples)

    @property
    def framing(self) -> Framing:
        """What stands around sources, and around targets."""
        return Framing(
            template_of(self.tokenizers[0], self.source_form),
            template_of(self.tokenizers[-1], self.target_form),
        )

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The source column."""
        return self.reading.columns[:1]

    def predict(
        self,
        model: Transformer,
        rows: Sequence[tuple[str, ...]],
        machine: Machine,
        settings: PredictSettings,
    ) -> list[dict[str, Any]]:
        """Returns ``{"translation", "score"}``, and the ``alternatives`` where they are wanted."""
        texts = [row[0].strip() for row in rows]
        found = []
        for hypotheses in self._translate(model, texts, machine, settings.decoding, settings):
            entries = [
                {
                    "translation": settings.cut(self._text(hypothesis.token_ids)).strip(),
                    "score": hypothesis.score,
                }
                for hypothesis in hypotheses
            ]
            best = entries[0] if entries else {"translation": "", "score": 0.0}
            others = {"alternatives": entries[1:]} if settings.decoding.num_return > 1 else {}
            found.append({**best, **others})
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the lengths, and what stands around texts where a pretrained model says so."""
        return {
            "max_length": self.max_length,
            "longest_target": self.longest_target,
            "framing": None if self._framing is None else dataclasses.asdict(self._framing),
        }

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], reading: Reading, tokenizers: tuple[Tokenizer, ...]
    ) -> Translation:
        """Builds the task of a saved run."""
        return cls(
            reading,
            tokenizers,
            max_length=values["max_length"],
            longest_target=values["longest_target"],
            framing=framing_from_json(values["framing"]),
        )

    def _translate(
        self,
        model: Transformer,
        sources: Sequence[str],
        machine: Machine,
        decoding: DecodingSettings,
        settings: PredictSettings | None = None,
    ) -> list[Any]:
        source_form = dataclasses.replace(self.source_form, cells=())
        tokenizer = self.tokenizers[-1]
        written = self.framing.written
        end = written.last[0]
        longest = min(self.max_length, self.longest_target + _SPARE_TOKENS)
        stop = settings.stop_rule(lambda _, ids: self._text(ids)) if settings else None
        return decode_sequences(
            model,
            machine,
            decoding,
            [written.first] * len(sources),
            sources=encode_texts(self.tokenizers[0], [(text,) for text in sources], source_form),
            limits=[min(longest, decoding.max_new_tokens)] * len(sources),
            rules=OutputRules(
                end_ids=frozenset({end}),
                banned_ids=[i for i in special_token_ids(tokenizer) if i != end],
                stop=stop,
                first_example=settings.first_example if settings else 0,
            ),
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizers[-1].decode(list(token_ids)).strip()


_SIDES = ("source", "target")
_NAMES = (
    ("source", "target"),
    ("src", "tgt"),
    ("input", "output"),
    ("word", "pronunciation"),
    ("document", "summary"),
    ("article", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("question", "query"),
)
# ISO 639-1 codes, with or without a region (zh-CN), and names of the commonest languages.
_LANGUAGE = re.compile(
    r"(ar|bg|bn|ca|cs|da|de|el|en|es|et|fa|fi|fr|ga|he|hi|hr|hu|id|is|it|ja|ka|ko|lt|lv|mk|ms|nb|nl"
    r"|nn|no|pl|pt|ro|ru|sk|sl|sq|sr|sv|sw|ta|te|th|tr|uk|ur|vi|zh)([-_][a-z]{2,4})?"
    r"|english|french|german|spanish|italian|portuguese|dutch|polish|russian|czech|chinese|japanese"
    r"|korean|arabic|turkish|swedish",
    re.IGNORECASE,
)


def _read_pair(cells: Sequence[Cell]) -> tuple[str, ...]:
    texts = []
    for side, cell in zip(_SIDES, cells, strict=True):
        try:
            texts.append(text_of(cell))
        except CellError as error:
            raise CellError(str(error).replace("the text", f"the {side}")) from None
    return tuple(texts)


def _named_pair(columns: Sequence[str], sample: Sequence[Row]) -> tuple[str, str] | None:
    """Returns the two columns whose names say that one is made from the other."""
    by_name = {name.strip().lower(): name for name in columns}
    for source, target in _NAMES:
        if source in by_name and target in by_name:
            return by_name[source], by_name[target]
    languages = [name for name in columns if _LANGUAGE.fullmatch(name.strip())]
    # An "id" may be Indonesian, and is more often the number of a row.
    texts = free_text_columns(sample, columns)
    languages = [name for name in languages if name.strip().lower() != "id" or name in texts]
    return (languages[0], languages[1]) if len(languages) == 2 else None


def _guess_pair(file: RowFile, sample: Sequence[Row]) -> tuple[tuple[str, str], str]:
    """Returns source and target column, and why.

    Raises:
        DataError: there are not two columns of text.
    """
    if named := _named_pair(file.columns, sample):
        return named, "by its name"
    texts = free_text_columns(sample, file.columns)
    if len(texts) != 2:
        raise DataError(
            f"{file.display_name}: translation needs two columns of text; name them with --source "
            f"and --target. The columns are: {', '.join(file.columns[:20])}."
        )
    return (texts[0], texts[1]), "one of two columns of text, in their order"


def _reasons(columns: Sequence[str], reason: str) -> tuple[str, ...]:
    return tuple(f"{side} column '{c}': {reason}" for side, c in zip(_SIDES, columns, strict=True))
