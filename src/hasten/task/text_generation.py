"""Text generation: what comes next, token by token (language modelling).

    one continuous text      --windows-->           every token is predicted from those before it
    documents                --[CLS] text [SEP]-->  the same, within each document
    prompt and response      --[CLS] prompt [SEP] response [SEP]-->   only the response is learned
    context, question, answer    the same, the prompt being the question and then the context
    instruction, input, output   the same, the prompt being the instruction and then the input
    chat messages            --[CLS] role [SEP] text [SEP] role ...-->  only the assistant's texts

Texts that are longer than the model's positions become several windows, none of them padded.

Shapes: E examples, S sequences, N tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from hasten.core.batch import PackedBatch
from hasten.core.errors import DataError, UsageError
from hasten.core.seeds import derive_seed
from hasten.data.columns import CellError, resolve_columns
from hasten.data.corpus import Corpus, Reading
from hasten.data.examples import Examples
from hasten.data.messages import LEARNED_ROLE, asked_messages, learned_turns, read_messages
from hasten.data.packing import pack_shifted
from hasten.data.redraw import Redraw, redrawn_tokens
from hasten.data.rows import Cell, Row, RowFile
from hasten.data.template import Framing, Template, template_from_json
from hasten.data.text_windows import Windows, cut_windows
from hasten.data.tokenizer import special_token_ids
from hasten.data.tokens import EncodingFormat, SpecialIds, TokenStore, open_tokens
from hasten.model.search import Decoded, DecodingSettings
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
from hasten.task.generating import OutputRules, TokenMeter, decode_sequences, token_loss_sum
from hasten.task.output_stream import OutputStream
from hasten.task.text_columns import FORMS, guess_form, named_columns

_SAMPLE_PROMPT_TOKENS, _SAMPLE_TOKENS = 8, 60
_PROMPTED_FORMS = ("pair", "question", "instruction")
_CUT_FORMS = (*_PROMPTED_FORMS, "messages")
_LEARNED = 1
"""Token type of what is learned, where prompts are not."""


class TextExamples(Examples):
    """Windows of texts, each predicted token by token.

    Args:
        corpus: the rows they come from.
        rows: those of the split.
        store: tokens of the corpus, row for row.
        task: which says how rows become windows.
        redraw: draws an epoch's tokens; None where all epochs have the same.
        seed: of the run, for the places where a continuous text is cut.
        epoch: whose windows these are; None for those of measurements.
    """

    def __init__(
        self,
        corpus: Corpus,
        rows: np.ndarray,
        store: TokenStore,
        task: TextGeneration,
        *,
        redraw: Redraw | None = None,
        seed: int = 0,
        epoch: int | None = None,
    ) -> None:
        self.corpus, self.store, self.task = corpus, store, task
        self._split_rows, self._redraw, self._seed = rows, redraw, seed
        windows = task.windows(corpus, rows, store, seed, epoch)
        self.starts, self.ends, self.rows = windows.starts, windows.ends, windows.rows
        self.lengths = self.ends - self.starts - 1
        self.weights = self._count_learned()
        self.num_truncated = store.num_truncated

    def _count_learned(self) -> np.ndarray:
        types = self.store.token_types
        if types is None:
            return self.lengths.astype(np.float64)
        learned = np.concatenate([[0], np.cumsum(types == _LEARNED)])
        return (learned[self.ends] - learned[self.starts + 1]).astype(np.float64)

    @property
    def num_bytes(self) -> int:
        """Bytes of the texts that are predicted: of pairs the responses', of chats the answers'."""
        if self.task.reading.form != "messages":
            return int(self.corpus.num_bytes(self._split_rows)[:, -1].sum())
        chats = (read_messages(row[0]) for row in self.corpus.texts(self._split_rows))
        return sum(
            len(text.encode())
            for turns in chats
            for text, learned in zip(turns, learned_turns(turns), strict=True)
            if learned
        )

    def prompt(self, example: int) -> list[int]:
        """Returns the tokens before the first one that is learned, where prompts are not."""
        types = self.store.token_types
        assert types is not None
        start, end = self.starts[example], self.ends[example]
        num_given = int(np.argmax(types[start:end] == _LEARNED))
        return self.store.token_ids[start : start + num_given].tolist()

    def pack(self, examples: np.ndarray, weight: float = 1.0) -> PackedBatch:
        """Packs windows; targets are the next tokens (N,)."""
        return pack_shifted(
            self.store,
            self.starts[examples],
            self.ends[examples],
            example_ids=examples,
            learned_type=None if self.store.token_types is None else _LEARNED,
            weight=weight,
        )

    def in_epoch(self, epoch: int) -> Examples:
        """Returns the texts with the tokens of an epoch, cut at other places than in the last."""
        return TextExamples(
            self.corpus,
            self._split_rows,
            self.store if self._redraw is None else self._redraw(epoch),
            self.task,
            redraw=self._redraw,
            seed=self._seed,
            epoch=epoch,
        )


class TextGeneration(Task):
    """Continues texts, or answers prompts.

    Args:
        reading: which columns are read, and how.
        tokenizers: the one tokenizer.
        max_length: longest window in tokens, which is what the model sees at a time.
        label_smoothing: share of each token's target that is spread over the vocabulary.
        template: what a pretrained model wants around a text that it writes, and between that and
            its prompt; None for a model of our own.
    """

    name = "text-generation"
    architecture = "decoder"
    head = "language_modelling"
    higher_is_better = {"loss": False, "perplexity": False, "bits_per_byte": False}  # noqa: RUF012
    default_metric = "loss"
    uses = frozenset({"label_smoothing", "max_length"})
    prediction_columns = ("generated", "score")
    generates = True
    exact_text = True

    def __init__(
        self,
        reading: Reading,
        tokenizers: tuple[Tokenizer, ...],
        *,
        max_length: int = 256,
        label_smoothing: float = 0.0,
        template: Template | None = None,
    ) -> None:
        self.reading, self.tokenizers = reading, tokenizers
        self.max_length, self.label_smoothing = max_length, label_smoothing
        self._template = template
        form = reading.form
        framed = None
        if template is not None and form != "text":
            framed = replace(template, numbers_segments=form in _CUT_FORMS)
            if form == "messages":  # each ends like the last
                framed = replace(framed, between=template.last)
        self.form = EncodingFormat(
            # Pairs and chats are cut; one more than the model's positions, since the last token
            # is only ever a target. Texts are not cut but become windows.
            max_length=max_length + 1 if form in _CUT_FORMS else 0,
            class_token=form != "text",
            separate_segments=form in _CUT_FORMS,
            end_token=form != "text",
            messages=form == "messages",
            template=framed,
        )

    # From a file to examples

    @classmethod
    def recognise(cls, file: RowFile, sample: Sequence[Row]) -> Recognised | None:
        """Takes plain text, chats, named prompts and responses, and single columns of text."""
        if file.format == "text":
            return Recognised(Certainty.FORMAT, "a file of plain text")
        found = guess_form(file, sample)
        return None if found is None else found.recognised

    @classmethod
    def choose_reading(
        cls, file: RowFile, sample: Sequence[Row], wanted: WantedColumns
    ) -> tuple[Reading, tuple[str, ...]]:
        """Chooses the column of texts, of chats, or those of prompts and responses."""
        named = named_columns(file, wanted)
        if named is not None:
            form = cls._form_of(file, sample, named)
            return cls.reading_of(form, named, None), FORMS[form].describe(named, "as asked for")
        if file.format == "text":
            reason = "text: continuous, cut into windows"
            return cls.reading_of("text", file.columns, None), (reason,)
        found = guess_form(file, sample)
        if found is None:
            raise DataError(
                f"{file.display_name}: no column of texts to continue; name it with --text-column, "
                "or prompts and responses with --source and --target."
            )
        return cls.reading_of(found.form, found.columns, None), found.reasons

    @classmethod
    def _form_of(cls, file: RowFile, sample: Sequence[Row], columns: tuple[str, ...]) -> str:
        """Returns how the columns that a person named are read."""
        if file.format == "text":
            return "text"
        found = guess_form(file, sample)
        if found is not None and found.columns == columns:
            return found.form
        if len(columns) > 1:
            return "pair" if len(columns) == 2 else "question"
        at = resolve_columns(file.columns, columns)[0]
        holds_lists = sum(isinstance(row.cells[at], list) for row in sample)
        return "messages" if 2 * holds_lists > len(sample) else "documents"

    @classmethod
    def reading_of(cls, form: str, columns: Sequence[str], label: str | None) -> Reading:
        """Reads texts as they are, documents, prompts with responses, or chats."""
        read_row = FORMS[form].read_row
        return Reading(cls.name, form, tuple(columns), None, read_row, form == "text")

    @classmethod
    def tokenizer_texts(
        cls, corpus: Corpus, rows: np.ndarray, reading: Reading, settings: TaskSettings
    ) -> list[Iterator[str]]:
        """Returns all texts of the rows."""
        is_chat = reading.form == "messages"
        texts = (read_messages(row[0]) if is_chat else row for row in corpus.texts(rows))
        return [itertools.chain.from_iterable(texts)]

    @classmethod
    def from_data(
        cls,
        corpus: Corpus,
        rows: np.ndarray,
        reading: Reading,
        tokenizers: tuple[Tokenizer, ...],
        settings: TaskSettings,
    ) -> TextGeneration:
        """Builds the task."""
        return cls(
            reading,
            tokenizers,
            max_length=settings.max_length,
            label_smoothing=settings.label_smoothing,
            template=None if settings.framing is None else settings.framing.written,
        )

    def examples(
        self, corpus: Corpus, rows: np.ndarray, drawing: Drawing | None = None
    ) -> TextExamples:
        """Returns the windows of some rows of a corpus."""
        store = open_tokens(corpus, self.tokenizers[0], self.form)
        if drawing is None:
            return TextExamples(corpus, rows, store, self)
        if self.reading.form == "messages" and not drawing.augmentation.is_off:
            raise UsageError("data.augment has no effect on chat messages; leave it out.")
        redraw = redrawn_tokens(
            corpus,
            rows,
            self.tokenizers[0],
            self.form,
            augmentation=drawing.augmentation,
            seed=drawing.seed,
        )
        return TextExamples(corpus, rows, store, self, redraw=redraw, seed=drawing.seed)

    def windows(
        self, corpus: Corpus, rows: np.ndarray, store: TokenStore, seed: int, epoch: int | None
    ) -> Windows:
        """Cuts the texts of some rows into windows; in training at other places each epoch."""
        starts, ends = store.offsets[rows], store.offsets[rows + 1]
        if self.reading.form != "text":
            return cut_windows(starts, ends, rows, self.max_length)
        # Neighbouring rows of one file are one text.
        firsts = {first for _, first in corpus.files}
        begins = np.array(
            [
                i == 0 or row in firsts or row != rows[i - 1] + 1
                for i, row in enumerate(rows.tolist())
            ]
        )
        first = np.flatnonzero(begins)
        last = np.append(first, len(rows))[1:] - 1
        shift = 0
        if epoch:
            shift = derive_seed("windows", seed, epoch) % self.max_length
        windows = cut_windows(starts[first], ends[last], rows[first], self.max_length, shift)
        owner = np.searchsorted(store.offsets, windows.starts, side="right") - 1
        return Windows(windows.starts, windows.ends, owner)

    # What is learned

    def model_options(self) -> dict[str, Any]:
        """Returns vocabulary and positions."""
        return {
            "vocab_size": self.tokenizers[0].get_vocab_size(),
            "max_positions": self.max_length,
            "head": self.head,
        }

    def loss_sum(self, outputs: Any, batch: PackedBatch) -> Tensor:
        """Returns the summed cross-entropy of the tokens that are learned."""
        return token_loss_sum(outputs, batch, self.label_smoothing)

    def new_meter(self, examples: Examples | None = None) -> TokenMeter:
        """Returns an empty meter of the loss, without label smoothing."""
        if examples is None:
            return TokenMeter()
        assert isinstance(examples, TextExamples)
        return TokenMeter(len(examples), examples.num_bytes)

    def decode(
        self,
        model: Transformer,
        examples: Examples,
        machine: Machine,
        settings: DecodingSettings,
        limit: int | None = None,
    ) -> DecodedSample:
        """Continues the beginning of one example, to be looked at; nothing is measured."""
        learned = np.flatnonzero(examples.weights)[:1]
        if not len(learned):
            return DecodedSample()
        row = next(examples.corpus.texts(examples.rows[learned]))
        if self.reading.form in _CUT_FORMS:
            assert isinstance(examples, TextExamples)
            prompt = examples.prompt(int(learned[0]))
            turns = read_messages(row[0]) if self.reading.form == "messages" else ()
            shown = turns[max(0, learned_turns(turns).index(1) - 2)] if turns else row[0]
        else:
            shown = self._text(self._encode(row[0][:1000])[:_SAMPLE_PROMPT_TOKENS])
            prompt = self._prompt((shown,))
        taste = DecodingSettings(max_new_tokens=_SAMPLE_TOKENS, temperature=0.8, top_p=0.95)
        (found,) = self._continue(model, [prompt], machine, taste)
        between = " -> " if self.reading.form in _CUT_FORMS else ""
        return DecodedSample(samples=(f"{shown}{between}{self._text(found[0].token_ids)}",))

    # How it is used

    @property
    def framing(self) -> Framing:
        """What stands around a prompt, and around a text that is written after it."""
        special, form = self._special, self.reading.form
        after = special.between if form in _PROMPTED_FORMS else ()
        return Framing(
            Template(special.first, (), after),
            Template(special.first, special.between, special.last),
        )

    @cached_property
    def _special(self) -> SpecialIds:
        return SpecialIds.of(self.tokenizers[0], self.form)

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns that are the prompt together, or the column of texts."""
        columns = self.reading.columns
        return columns[:-1] if self.reading.form in _PROMPTED_FORMS else columns

    @property
    def num_optional_inputs(self) -> int:
        """An instruction needs no input."""
        return FORMS[self.reading.form].num_optional

    def predict(
        self,
        model: Transformer,
        rows: Sequence[tuple[str, ...]],
        machine: Machine,
        settings: PredictSettings,
    ) -> list[dict[str, Any]]:
        """Returns ``{"generated", "score"}``, and the ``alternatives`` where they are wanted."""
        try:
            prompts = [self._prompt(row) for row in rows]
        except CellError as error:
            raise UsageError(f"{error}.") from None
        if settings.stream is not None and len(rows) > 1:
            raise UsageError("only a single output can be told as it comes.")
        stream = None if settings.stream is None else OutputStream(settings, self._text)
        results = self._continue(model, prompts, machine, settings.decoding, settings, stream)
        found = []
        for hypotheses in results:
            entries = [
                {"generated": settings.cut(self._text(h.token_ids)), "score": h.score}
                for h in hypotheses
            ]
            others = {"alternatives": entries[1:]} if settings.decoding.num_return > 1 else {}
            found.append({**entries[0], **others})
            if stream is not None:
                stream.tell(entries[0]["generated"])
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the window's length, and what stands around texts where a model says so."""
        template = None if self._template is None else asdict(self._template)
        return {"max_length": self.max_length, "template": template}

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], reading: Reading, tokenizers: tuple[Tokenizer, ...]
    ) -> TextGeneration:
        """Builds the task of a saved run."""
        template = template_from_json(values["template"])
        return cls(reading, tokenizers, max_length=values["max_length"], template=template)

    def read_inputs(self, cells: Sequence[Cell]) -> tuple[str, ...]:
        """Returns a row to predict, of which a file gives the cells; chats as JSON.

        Raises:
            CellError: there is nothing to continue or to answer, or it is too long.
        """
        if self.reading.form == "messages" and isinstance(cells[0], list):
            asked_messages(cells[0])  # whatever it holds, a list is no text
            cells = (json.dumps(cells[0]),)
        inputs = super().read_inputs(cells)
        self._prompt(inputs)
        return inputs

    def _prompt(self, row: Sequence[str]) -> list[int]:
        """Returns the tokens that an output continues.

        Raises:
            CellError: they are more than the model has positions, or no chat.
        """
        form, special = self.reading.form, self._special
        if form == "messages":
            turns = (*asked_messages(row[0]), LEARNED_ROLE)
            ids = [*special.first]
            ids += [token for text in turns for token in (*self._encode(text), *special.between)]
        else:
            ids = self._encode(FORMS[form].join(*row))
        if form == "text":
            # Nothing to continue: a line end begins as good a text as any.
            ids = ids or self._encode("\n") or [special.unknown]
        elif form == "documents":
            ids = [*special.first, *ids]
        elif form in _PROMPTED_FORMS:
            ids = [*special.first, *ids, *special.between]
        if len(ids) <= self.max_length:
            return ids
        if form in _CUT_FORMS:
            raise CellError(
                f"a prompt of {len(ids)} tokens is longer than the model's {self.max_length} "
                "positions: shorten it"
            )
        return ids[-self.max_length :]  # a model sees no further back than that anyway

    def _continue(
        self,
        model: Transformer,
        prompts: Sequence[list[int]],
        machine: Machine,
        decoding: DecodingSettings,
        settings: PredictSettings | None = None,
        stream: OutputStream | None = None,
    ) -> list[list[Decoded]]:
        tokenizer = self.tokenizers[0]
        end = self._special.last[0] if self._special.last else None
        stop = None
        if settings is not None:
            stop = settings.stop_rule(lambda _, ids: self._text(ids))
        return decode_sequences(
            model,
            machine,
            decoding,
            prompts,
            rules=OutputRules(
                end_ids=frozenset() if end is None else frozenset({end}),
                banned_ids=[i for i in special_token_ids(tokenizer) if i != end],
                stop=stop,
                on_token=None if stream is None else stream.add,
            ),
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizers[0].encode(text, add_special_tokens=False).ids

    def _text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizers[0].decode(list(token_ids))
