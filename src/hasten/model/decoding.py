"""Continues sequences token by token, with keys and values of the past kept in a cache.

    prompts (PackedBatch) --packed forward--> cache, scores of each sequence's next token
    tokens (B,) --one step--> cache grows by a position, scores of the next ones

``CachedDecoder`` is what ``hasten.model.search`` searches over. Prompts run packed, as in
training; a step works on rectangles padded on the right, whose padding is masked.

Shapes: B sequences, T positions of the cache, D hidden size, H heads, K key/value heads, C head
size, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hasten.core.batch import PackedBatch, SequenceLayout, positions_from_lengths
from hasten.core.errors import UsageError
from hasten.model.attention import Attention, attend, attend_dense
from hasten.model.heads import TokenOutputs
from hasten.model.positions import Rotary
from hasten.model.transformer import Block, Transformer

_SPARE_POSITIONS = 32


class CachedDecoder:
    """B sequences that are being continued.

    Args:
        model: a decoder or an encoder-decoder with scores of tokens, in evaluation mode.
        prompts: what the sequences begin with, at least one token each; with its source where the
            model is an encoder-decoder.

    Attributes:
        logits: (B, V) scores of each sequence's next token, float32 or wider.

    Raises:
        UsageError: the model cannot continue sequences, or a prompt is too long for it.
    """

    def __init__(self, model: Transformer, prompts: PackedBatch) -> None:
        if model.decoder is None:
            raise UsageError("only a decoder can continue a text.")
        self._model, self._decoder = model, model.decoder
        self._max_positions = model.config.max_positions
        self._source: list[_PastKeys] = []
        if prompts.source is not None:
            self._read_source(prompts.source)
        self._prefill(prompts)

    @torch.inference_mode()
    def advance(self, tokens_B: Tensor) -> None:
        """Appends one token to each sequence and computes the scores of the next.

        A sequence that fills all positions of the model goes on from the second half of itself.
        """
        self._append(tokens_B)
        if self._source and int(self._lengths.max()) > self._max_positions:
            raise UsageError(
                f"the output is longer than the model's {self._max_positions} positions; "
                "lower --max-new-tokens."
            )
        if not self._source and int(self._lengths.max()) > self._max_positions:
            self._begin_anew()
            return
        at_B = self._lengths - 1
        model, decoder = self._model, self._decoder
        positions = at_B.to(torch.int32)
        x_BD = decoder.enter(model.embedding(tokens_B), positions)
        rotations, bias = decoder.rotate(positions), self._bias_of_last()
        layout = SequenceLayout.from_lengths([1] * len(tokens_B), tokens_B.device)
        for number, block in enumerate(decoder.blocks):
            assert isinstance(block, Block)
            past, rotary = self._past[number], block.rotary(rotations)

            def attend_to_past(
                attention: Attention,
                h: Tensor,
                past: _PastKeys = past,
                rotary: Rotary | None = rotary,
            ) -> Tensor:
                k_BKC, v_BKC = attention.keys_values(h, rotary)
                past.append(k_BKC, v_BKC, at_B)
                return past.read(attention, attention.queries(h, rotary), at_B + 1, bias)

            def attend_to_source(attention: Attention, h: Tensor, number: int = number) -> Tensor:
                return self._source[number].read(attention, attention.queries(h, None))

            x_BD = block.run(x_BD, layout, attend_to_past, attend_to_source)
        self._set_logits(decoder.leave(x_BD), layout)

    @torch.inference_mode()
    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders sequences: row i becomes what row ``rows[i]`` was."""
        self.logits = self.logits.index_select(0, rows)
        self._lengths = self._lengths.index_select(0, rows)
        self._token_ids = self._token_ids.index_select(0, rows)
        for past in (*self._past, *self._source):
            past.select(rows)

    @torch.inference_mode()
    def _read_source(self, source: PackedBatch) -> None:
        memory_MD = self._model.encode(source)
        lengths = torch.tensor(source.layout.lengths, device=memory_MD.device)
        for block in self._decoder.blocks:
            assert isinstance(block, Block) and block.source_attention is not None
            k_MKC, v_MKC = block.source_attention.keys_values(memory_MD, None)
            self._source.append(_PastKeys(k_MKC, v_MKC, source.layout, 0))
            self._source[-1].lengths = lengths

    @torch.inference_mode()
    def _prefill(self, prompts: PackedBatch) -> None:
        """Runs whole prompts packed and keeps their keys and values."""
        layout, decoder = prompts.layout, self._decoder
        longest = max(layout.lengths)
        if longest > self._max_positions:
            raise UsageError(
                f"a prompt of {longest} tokens is longer than the model's {self._max_positions} "
                "positions; shorten it."
            )
        self._past: list[_PastKeys] = []
        self._lengths = torch.tensor(layout.lengths, device=prompts.token_ids.device)
        self._token_ids = _padded(prompts.token_ids, layout, _SPARE_POSITIONS)
        rotations, biases = decoder.rotate(prompts.positions), decoder.biases(layout.group_plan)
        x_ND = decoder.enter(self._model.embed(prompts), prompts.positions)
        for number, block in enumerate(decoder.blocks):
            assert isinstance(block, Block)
            rotary = block.rotary(rotations)

            def attend_and_keep(
                attention: Attention, h: Tensor, rotary: Rotary | None = rotary
            ) -> Tensor:
                k_NKC, v_NKC = attention.keys_values(h, rotary)
                self._past.append(_PastKeys(k_NKC, v_NKC, layout, _SPARE_POSITIONS))
                q_NHC = attention.queries(h, rotary)
                out_NHC = attend(q_NHC, k_NKC, v_NKC, layout.group_plan, attention.spec, biases)
                return attention.output(out_NHC.flatten(1))

            def attend_to_source(attention: Attention, h: Tensor, number: int = number) -> Tensor:
                return self._source[number].read_stream(attention, h, layout)

            x_ND = block.run(x_ND, layout, attend_and_keep, attend_to_source)
        last = layout.offsets[1:].long() - 1
        self._set_logits(decoder.leave(x_ND).index_select(0, last), layout)

    def _bias_of_last(self) -> Tensor | None:
        """Returns (B, H, 1, T): what the last token of each sequence adds for each key."""
        bias = self._decoder.relative_bias
        if bias is None:
            return None
        at_T = torch.arange(int(self._lengths.max()), device=self._lengths.device)
        return bias(at_T - (self._lengths[:, None] - 1)).transpose(1, 2)[:, :, None]

    def _set_logits(self, x_BD: Tensor, layout: SequenceLayout) -> None:
        outputs = self._model.score(x_BD, layout)
        assert isinstance(outputs, TokenOutputs)
        scores_BV = outputs.scores()
        self.logits = scores_BV if scores_BV.dtype == torch.float64 else scores_BV.float()

    def _append(self, tokens_B: Tensor) -> None:
        self._lengths = self._lengths + 1
        needed = int(self._lengths.max())
        if needed > self._token_ids.shape[1]:
            grown = self._token_ids.new_zeros(len(tokens_B), 2 * needed)
            grown[:, : self._token_ids.shape[1]] = self._token_ids
            self._token_ids = grown
        self._token_ids[torch.arange(len(tokens_B)), self._lengths - 1] = tokens_B

    def _begin_anew(self) -> None:
        """Cuts full sequences to their second half and reads all again."""
        half = max(1, self._max_positions // 2)
        kept = [
            ids[length - half : length] if length > self._max_positions else ids[:length]
            for ids, length in zip(self._token_ids, self._lengths.tolist(), strict=True)
        ]
        lengths = [len(ids) for ids in kept]
        device = self._token_ids.device
        self._prefill(
            PackedBatch(
                token_ids=torch.cat(kept),
                positions=torch.from_numpy(positions_from_lengths(lengths)).to(device),
                layout=SequenceLayout.from_lengths(lengths, device),
                example_ids=torch.arange(len(lengths), device=device),
            )
        )


class _PastKeys:
    """Keys and values (B, K, T, C) of one layer, padded on the right.

    Attributes:
        lengths: (B,) real positions of each sequence, where they do not grow (a source).
    """

    def __init__(
        self, k_NKC: Tensor, v_NKC: Tensor, layout: SequenceLayout, num_spare: int
    ) -> None:
        self.lengths: Tensor | None = None
        self._keys = _padded(k_NKC, layout, num_spare).transpose(1, 2)
        self._values = _padded(v_NKC, layout, num_spare).transpose(1, 2)

    def append(self, k_BKC: Tensor, v_BKC: Tensor, at_B: Tensor) -> None:
        """Puts one more position into each sequence, at its own place."""
        needed = int(at_B.max()) + 1
        if needed > self._keys.shape[2]:
            self._keys, self._values = _grown(self._keys, needed), _grown(self._values, needed)
        rows = torch.arange(len(at_B), device=at_B.device)
        self._keys[rows, :, at_B] = k_BKC
        self._values[rows, :, at_B] = v_BKC

    def read(
        self,
        attention: Attention,
        q_BHC: Tensor,
        lengths_B: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Returns the attention's output (B, D) for one query of each sequence."""
        lengths_B = self.lengths if lengths_B is None else lengths_B
        assert lengths_B is not None
        longest = int(lengths_B.max())
        at = torch.arange(longest, device=q_BHC.device)
        seen_BT = at < lengths_B[:, None]
        window = attention.spec.window
        if window:
            seen_BT = seen_BT & (at >= lengths_B[:, None] - window)
        out_BH1C = attend_dense(
            q_BHC[:, :, None],
            self._keys[:, :, :longest],
            self._values[:, :, :longest],
            seen_BT[:, None, None],
            attention.spec,
            bias,
        )
        return attention.output(out_BH1C[:, :, 0].flatten(1))

    def read_stream(self, attention: Attention, h_ND: Tensor, layout: SequenceLayout) -> Tensor:
        """Returns the attention's output (N, D) for all tokens of a packed stream."""
        q_NHC = attention.queries(h_ND, None)
        if len(layout.lengths) == len(h_ND):  # one token each, as translation begins
            return self.read(attention, q_NHC)
        rows = layout.sequence_ids
        assert self.lengths is not None
        every = _PastKeys.__new__(_PastKeys)
        every.lengths = self.lengths.index_select(0, rows)
        every._keys, every._values = self._keys[rows], self._values[rows]
        return every.read(attention, q_NHC)

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders sequences."""
        self._keys = self._keys.index_select(0, rows)
        self._values = self._values.index_select(0, rows)
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, rows)


def _padded(stream: Tensor, layout: SequenceLayout, num_spare: int) -> Tensor:
    """Lays a stream (N, ...) out as (B, T, ...), zeros after each sequence."""
    lengths = np.asarray(layout.lengths)
    positions = torch.from_numpy(positions_from_lengths(layout.lengths)).long().to(stream.device)
    size = (len(lengths), int(lengths.max()) + num_spare, *stream.shape[1:])
    out = stream.new_zeros(size)
    out[layout.sequence_ids, positions] = stream
    return out


def _grown(x_BKTC: Tensor, needed: int) -> Tensor:
    size = (*x_BKTC.shape[:2], 2 * needed, x_BKTC.shape[3])
    out = x_BKTC.new_zeros(size)
    out[:, :, : x_BKTC.shape[2]] = x_BKTC
    return out
