"""Our Block against torch's ``TransformerEncoderLayer`` and ``TransformerDecoderLayer``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from builders import default_dtype
from hasten.core.batch import SequenceLayout, plan_groups
from hasten.model.attention import Attention
from hasten.model.config import TransformerConfig
from hasten.model.transformer import Block, Surroundings

WIDTH, HEADS, INNER = 24, 3, 40
Layer = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer


def attention_pairs(ours: Attention, theirs: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor]]:
    """Our parameters, and torch's that must equal them."""
    pairs = [
        (ours.output.weight, theirs.out_proj.weight),
        (ours.output.bias, theirs.out_proj.bias),
    ]
    for i, part in enumerate((ours.query, ours.key, ours.value)):
        rows = slice(i * WIDTH, (i + 1) * WIDTH)
        pairs += [
            (part.weight, theirs.in_proj_weight[rows]),
            (part.bias, theirs.in_proj_bias[rows]),
        ]
    return pairs


def parameter_pairs(block: Block, layer: Layer) -> list[tuple[Tensor, Tensor]]:
    norms = [block.attention_norm, block.feed_forward_norm]
    pairs = attention_pairs(block.attention, layer.self_attn)
    if isinstance(layer, nn.TransformerDecoderLayer):
        assert block.source_attention is not None and block.source_norm is not None
        pairs += attention_pairs(block.source_attention, layer.multihead_attn)
        norms.insert(1, block.source_norm)
    modules = [(block.feed_forward.up, layer.linear1), (block.feed_forward.down, layer.linear2)]
    modules += [(norm, getattr(layer, f"norm{i}")) for i, norm in enumerate(norms, 1)]
    for ours, theirs in modules:
        pairs += [(ours.weight, theirs.weight), (ours.bias, theirs.bias)]
    assert sum(a.numel() for a, _ in pairs) == sum(p.numel() for p in block.parameters())
    return pairs


def build(layer_type: type[Layer], placement: Any, activation: Any) -> tuple[Block, Layer]:
    """A Block and torch's layer with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    before = placement == "pre"
    layer = layer_type(WIDTH, HEADS, INNER, 0.1, activation, batch_first=True, norm_first=before)
    for parameter in layer.parameters():  # norms and biases away from ones and zeros
        nn.init.normal_(parameter, mean=0.1, std=0.5)
    reads_source = isinstance(layer, nn.TransformerDecoderLayer)
    block = Block(
        TransformerConfig(
            vocab_size=1,
            num_layers=1,
            hidden_size=WIDTH,
            num_heads=HEADS,
            feed_forward_size=INNER,
            activation=activation,
            norm="layernorm",
            norm_placement=placement,
            bias=True,
            dropout=0.1,
        ),
        causal=reads_source,
        reads_source=reads_source,
    )
    with torch.no_grad():
        for ours, theirs in parameter_pairs(block, layer):
            ours.copy_(theirs)
    return block.eval(), layer.eval()


def assert_same_gradients(block: Block, layer: Layer) -> None:
    """Compares the gradients of all parameters, reached through the pairs of values."""
    ours = [ours for ours, _ in parameter_pairs(block, layer)]
    for parameter in layer.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad  # so that the pairs' slices are of the gradients
    theirs = [theirs for _, theirs in parameter_pairs(block, layer)]
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad, expected.detach(), rtol=1e-9, atol=1e-10)


def assert_same_streams(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [1, 9, 4], [2, 200, 90]])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_block_equals_torchs_layer(placement: str, activation: str, lengths: list[int]):
    with default_dtype(torch.float64):
        block, layer = build(nn.TransformerEncoderLayer, placement, activation)
        leaves = [torch.randn(n, WIDTH).requires_grad_() for n in lengths]
        expected = torch.cat([layer(s[None])[0] for s in leaves])
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        stream = torch.cat(leaves).detach().requires_grad_()
        layout = SequenceLayout.from_lengths(lengths)
        found = block(stream, Surroundings(layout, layout.group_plan))
        (found * weight).sum().backward()
        gradient = torch.cat([leaf.grad for leaf in leaves])
        assert_same_streams([found, stream.grad], [expected, gradient])
        assert_same_gradients(block, layer)


@pytest.mark.parametrize(
    ("lengths", "source_lengths"),
    [([6, 6, 6], [4, 4, 4]), ([1, 9, 4], [8, 2, 3]), ([2, 200, 90], [150, 1, 60])],
)
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_block_that_reads_a_source_equals_torchs_layer(
    placement: str, lengths: list[int], source_lengths: list[int]
):
    with default_dtype(torch.float64):
        block, layer = build(nn.TransformerDecoderLayer, placement, "relu")
        leaves, sources = (
            [torch.randn(n, WIDTH).requires_grad_() for n in sizes]
            for sizes in (lengths, source_lengths)
        )
        masks = [nn.Transformer.generate_square_subsequent_mask(n) for n in lengths]
        expected = torch.cat(
            [
                layer(own[None], source[None], tgt_mask=mask)[0]
                for own, source, mask in zip(leaves, sources, masks, strict=True)
            ]
        )
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        stream, memory = (torch.cat(x).detach().requires_grad_() for x in (leaves, sources))
        layout, other = (SequenceLayout.from_lengths(x) for x in (lengths, source_lengths))
        around = Surroundings(
            layout,
            layout.group_plan,
            memory_MD=memory,
            memory_plan=plan_groups(layout, other),
        )
        found = block(stream, around)
        (found * weight).sum().backward()
        gradients = [torch.cat([leaf.grad for leaf in x]) for x in (leaves, sources)]
        assert_same_streams([found, stream.grad, memory.grad], [expected, *gradients])
        assert_same_gradients(block, layer)
