"""The same modules on padded rectangles, with fixed inputs and one tensor as output, to be traced.

    ids (B, T), mask (B, T) --embed--> (B, T, E) -> stack -> (B, T, D) -> head -> scores
    source ids, mask (B, M) --embed--> encoder --memory (B, M, D)--^

Packed batches are what models are trained and measured with; here is what other runtimes ask for.
Padding follows the tokens. Nothing in a forward depends on the values of sizes, so one trace
serves all of them.

Shapes: B sequences, T tokens of each, M tokens of each source, padding included, D hidden size,
E width of the embeddings, H heads, C head size, K classes, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.core.batch import SequenceLayout
from hasten.model.attention import Attention, attend_dense, is_near
from hasten.model.heads import ClassificationHead, SpanHead, TokenHead
from hasten.model.layers import Embedding
from hasten.model.positions import Rotary, apply_rotary
from hasten.model.transformer import Block, Stack, Transformer

# Only stochastic depth asks for it, in training.
_NO_LAYOUT = SequenceLayout(torch.zeros(1, dtype=torch.int32), ())


class DenseTransformer(nn.Module):
    """A trained ``Transformer`` on padded ids, in evaluation mode; it shares its weights.

    Args:
        model: whose modules it runs.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(
        self,
        token_ids: Tensor,
        mask: Tensor,
        token_types: Tensor | None = None,
        source_ids: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """Scores padded sequences; rows of padding, where there are any in the output, are junk.

        Args:
            token_ids: (B, T); at padding any id of the vocabulary.
            mask: (B, T), 1 at tokens and 0 at padding, which follows them.
            token_types: (B, T) segments; None for all 0.
            source_ids: (B, M) of an encoder-decoder.
            source_mask: (B, M).

        Returns:
            Before the softmax: (B, K) scores of classes, (B, T, 2) scores of a span's ends, or
            (B, T, V) scores of the tokens that follow.
        """
        model = self.model
        seen = mask.bool()
        x_BTE = model.embedding(token_ids, token_types)
        if model.decoder is None:
            assert model.encoder is not None
            return self._score(_run_stack(model.encoder, x_BTE, seen), mask)
        memory_BMD = source_seen = None
        if source_ids is not None and source_mask is not None:
            assert model.encoder is not None
            source_seen = source_mask.bool()
            embedding = model.source_embedding or model.embedding
            assert isinstance(embedding, Embedding)
            memory_BMD = _run_stack(model.encoder, embedding(source_ids), source_seen)
        x_BTD = _run_stack(model.decoder, x_BTE, seen, memory_BMD, source_seen)
        return self._score(x_BTD, mask)

    def _score(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        head = self.model.head
        if isinstance(head, TokenHead):
            return head(x_BTD, self.model.embedding.tokens.weight).scores()
        if isinstance(head, ClassificationHead):
            return head.classifier(head.prepared(_pool(head, x_BTD, mask_BT)))
        assert isinstance(head, SpanHead)
        return head(x_BTD)


def _run_stack(
    stack: Stack,
    x_BTE: Tensor,
    seen_BT: Tensor,
    memory_BMD: Tensor | None = None,
    memory_seen_BM: Tensor | None = None,
) -> Tensor:
    """Maps embeddings (B, T, E) to hidden states (B, T, D)."""
    positions_T = torch.arange(x_BTE.shape[1], device=x_BTE.device)
    distances_TT = positions_T[:, None] - positions_T
    rotations = stack.rotate(positions_T)
    bias_HTT = None
    if stack.relative_bias is not None:
        bias_HTT = stack.relative_bias(-distances_TT).permute(2, 0, 1)
    x_BTD = stack.enter(x_BTE, positions_T)
    for block in stack.blocks:
        assert isinstance(block, Block)
        spec = block.attention.spec
        visible = seen_BT[:, None, None, :]
        if spec.causal or spec.window:
            visible = visible & is_near(distances_TT, spec.window, spec.causal)
        if spec.window:  # a row of padding that saw nothing would be no number
            visible = visible | (distances_TT == 0)
        rotary = block.rotary(rotations)

        def attend_to_itself(
            attention: Attention, h: Tensor, seen: Tensor = visible, rotary: Rotary | None = rotary
        ) -> Tensor:
            return _attend(attention, h, h, seen, rotary, bias_HTT)

        def attend_to_source(attention: Attention, h: Tensor) -> Tensor:
            assert memory_BMD is not None and memory_seen_BM is not None
            return _attend(attention, h, memory_BMD, memory_seen_BM[:, None, None, :])

        x_BTD = block.run(x_BTD, _NO_LAYOUT, attend_to_itself, attend_to_source)
    return stack.leave(x_BTD)


def _attend(
    attention: Attention,
    x_BTD: Tensor,
    memory_BMD: Tensor,
    visible: Tensor,
    rotary: Rotary | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns (B, T, D) of queries that see keys where ``visible``, (B, 1, T or 1, M)."""
    q_BTHC = attention.queries(x_BTD)
    k_BMKC, v_BMKC = attention.keys_values(memory_BMD)
    if rotary is not None:
        q_BTHC, k_BMKC = apply_rotary(q_BTHC, *rotary), apply_rotary(k_BMKC, *rotary)
    shared = q_BTHC.shape[2] // k_BMKC.shape[2]
    if shared > 1:  # runtimes know no heads that share their keys
        k_BMKC, v_BMKC = (x.repeat_interleave(shared, dim=2) for x in (k_BMKC, v_BMKC))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BMKC, v_BMKC))
    out_BHTC = attend_dense(q, k, v, visible, attention.spec, bias)
    # A copy, because exporters think other strides of it than the kernel here gives it.
    out_BTHC = out_BHTC.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return attention.output(out_BTHC.flatten(2))


def _pool(head: ClassificationHead, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns one vector a sequence, (B, D)."""
    if head.pooling == "first":
        return x_BTD[:, 0]
    lengths_B1 = mask_BT.sum(1, keepdim=True)
    if head.pooling == "last":
        positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        weights_BT = positions_T == lengths_B1 - 1
    elif head.scorer is None:
        weights_BT = mask_BT / lengths_B1
    else:
        scores_BT = head.scorer(x_BTD).squeeze(-1)
        weights_BT = scores_BT.masked_fill(mask_BT == 0, float("-inf")).softmax(-1)
    return (weights_BT.to(x_BTD.dtype).unsqueeze(1) @ x_BTD).squeeze(1)
