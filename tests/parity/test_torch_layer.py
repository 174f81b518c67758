"""Our Block against ``torch.nn.TransformerEncoderLayer`` with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from builders import default_dtype
from hasten.core.batch import SequenceLayout
from hasten.model.config import TransformerConfig
from hasten.model.transformer import Block

WIDTH, HEADS, INNER = 24, 3, 40


@torch.no_grad()
def copy_weights(layer: nn.TransformerEncoderLayer, block: Block) -> None:
    attention = block.attention
    for i, part in enumerate((attention.query, attention.key, attention.value)):
        part.weight.copy_(layer.self_attn.in_proj_weight[i * WIDTH : (i + 1) * WIDTH])
        part.bias.copy_(layer.self_attn.in_proj_bias[i * WIDTH : (i + 1) * WIDTH])
    for ours, theirs in (
        (attention.output, layer.self_attn.out_proj),
        (block.feed_forward.up, layer.linear1),
        (block.feed_forward.down, layer.linear2),
        (block.attention_norm, layer.norm1),
        (block.feed_forward_norm, layer.norm2),
    ):
        ours.weight.copy_(theirs.weight)
        ours.bias.copy_(theirs.bias)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [1, 9, 4], [2, 200, 90]])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_block_equals_torchs_layer(placement: str, activation: str, lengths: list[int]):
    with default_dtype(torch.float64):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            WIDTH,
            HEADS,
            INNER,
            0.1,
            activation,
            batch_first=True,
            norm_first=placement == "pre",
        )
        for parameter in layer.parameters():  # norms and biases away from ones and zeros
            nn.init.normal_(parameter, mean=0.1, std=0.5)
        block = Block(
            TransformerConfig(
                vocab_size=1,
                num_layers=1,
                hidden_size=WIDTH,
                num_heads=HEADS,
                feed_forward_size=INNER,
                activation=activation,
                norm="layernorm",  # pyright: ignore
                norm_placement=placement,
                bias=True,
                dropout=0.1,  # pyright: ignore
            )
        )
        copy_weights(layer, block)
        layer.eval()
        block.eval()
        sequences = [torch.randn(n, WIDTH) for n in lengths]
        leaves = [s.clone().requires_grad_() for s in sequences]
        expected = torch.cat([layer(s[None])[0] for s in leaves])
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        stream = torch.cat(sequences).requires_grad_()
        found = block(stream, SequenceLayout.from_lengths(lengths), None)
        (found * weight).sum().backward()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        gradient = torch.cat([leaf.grad for leaf in leaves])
        torch.testing.assert_close(stream.grad, gradient, rtol=1e-10, atol=1e-10)
        for ours, theirs in (
            (block.feed_forward.up, layer.linear1),
            (block.attention.output, layer.self_attn.out_proj),
            (block.attention_norm, layer.norm1),
        ):
            for name in ("weight", "bias"):
                torch.testing.assert_close(
                    getattr(ours, name).grad, getattr(theirs, name).grad, rtol=1e-9, atol=1e-10
                )
