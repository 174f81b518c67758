"""Small random models of transformers beside ours: the cases of parity, and how they are compared.

transformers model --save_pretrained--> folder --load_pretrained--> ours
    outputs, loss and gradients on one ragged batch, padded there and packed here
ours --save_pretrained--> folder --from_pretrained--> transformers model: the same outputs
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hasten.core.batch import pack_padded
from hasten.model.config import Head
from hasten.model.heads import TokenOutputs
from hasten.model.pretrained.reading import Loaded, load_pretrained
from hasten.model.pretrained.writing import save_pretrained

LENGTHS, SOURCE_LENGTHS = (9, 3, 14, 1, 14), (5, 11, 2, 8, 11)
VOCABULARY, LABELS = 61, 3
_KEPT = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class PretrainedCase:
    """One model of transformers.

    Attributes:
        name: shown.
        kind: name of its class.
        config: of the class, without sizes that all share.
        head: that it has here.
        lengths: of the sequences of the batch.
    """

    name: str
    kind: str
    config: Callable[[], Any]
    head: Head
    lengths: tuple[int, ...] = LENGTHS

    def build(self) -> Any:
        """Returns the model of transformers, its weights far from their first values."""
        torch.manual_seed(hash_of(self.name))
        model = getattr(transformers, self.kind)(self.config()).eval()
        with torch.no_grad():
            # Tables of sinusoids, which are not trained, stay what they are.
            changed = [p for p in model.parameters() if p.requires_grad]
            changed += [b for n, b in model.named_buffers() if n == "final_logits_bias"]
            for tensor in changed:
                tensor.add_(torch.randn_like(tensor) * 0.05)
        model.tie_weights()
        return model


@dataclass(frozen=True)
class Parity:
    """Largest relative differences between the two.

    Attributes:
        outputs: of scores.
        loss: of the mean loss.
        gradients: of every parameter, each by its largest element.
        back: of scores, of the model that transformers loads from what we wrote.
    """

    outputs: float
    loss: float
    gradients: float
    back: float


def hash_of(text: str) -> int:
    """Returns a number that is the same in every process."""
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(text))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest difference, relative to the largest element."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def padded(lengths: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Returns token ids and mask (B, T); no padding is among the tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids.where(mask, 1), mask.long()


def compare(case: PretrainedCase, folder: Path) -> Parity:
    """Runs a case in a folder of its own."""
    theirs = case.build()
    theirs.save_pretrained(folder / "theirs")
    loaded = load_pretrained(folder / "theirs", head=case.head)
    assert not loaded.missing and not loaded.unexpected, (loaded.missing, loaded.unexpected)
    batch = _Both(case)
    scores_there, loss_there = batch.run_theirs(theirs)
    loss_there.backward()
    ours = loaded.model.eval()
    scores_here, loss_here = batch.run_ours(ours)
    loss_here.backward()
    (folder / "ours").mkdir()
    tensors = ours.state_dict()
    extra = {name: getattr(theirs.config, name, None) for name in _KEPT}
    if case.head == "classification":
        extra["num_labels"] = LABELS
    save_pretrained(folder / "ours", ours.config, tensors, extra)
    # Another class where two families say the same, as ELECTRA of one width and BERT do.
    kind = json.loads((folder / "ours" / "config.json").read_text())["architectures"][0]
    again, info = getattr(transformers, kind).from_pretrained(
        folder / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        scores_back, _ = batch.run_theirs(again.eval())
    return Parity(
        outputs=relative(scores_here, scores_there),
        loss=relative(loss_here, loss_there),
        gradients=_gradient_difference(loaded, theirs),
        back=relative(scores_back, scores_here),
    )


class _Both:
    """One batch for both sides, and its loss."""

    def __init__(self, case: PretrainedCase) -> None:
        self.case = case
        self.ids, self.mask = padded(case.lengths, 1)
        self.source, self.source_mask = padded(SOURCE_LENGTHS, 2)
        generator = torch.Generator().manual_seed(3)
        self.labels = torch.randint(0, LABELS, (len(case.lengths),), generator=generator)
        limits = torch.tensor(case.lengths)
        self.spans = (torch.rand(2, len(case.lengths), generator=generator) * limits).long()

    def run_theirs(self, model: Any) -> tuple[Tensor, Tensor]:
        """Returns scores of what is real, and the mean loss."""
        head = self.case.head
        if model.config.is_encoder_decoder:
            out = model(
                input_ids=self.source,
                attention_mask=self.source_mask,
                decoder_input_ids=self.ids,
                decoder_attention_mask=self.mask,
            )
            return self._tokens(out.logits)
        given = {"input_ids": self.ids, "attention_mask": self.mask}
        if head == "classification":
            out = model(**given, labels=self.labels)
            return out.logits, out.loss
        if head == "span":
            out = model(**given, start_positions=self.spans[0], end_positions=self.spans[1])
            both = torch.stack([out.start_logits, out.end_logits], dim=-1)
            return both[self.mask.bool()], self._span_loss(out.start_logits, out.end_logits)
        return self._tokens(model(**given).logits)

    def run_ours(self, model: Any) -> tuple[Tensor, Tensor]:
        """Returns the same of the packed batch."""
        head, batch = self.case.head, pack_padded(self.ids, self.mask)
        if model.config.architecture == "encoder_decoder":
            source = pack_padded(self.source, self.source_mask)
            batch = dataclasses.replace(batch, source=source)
        outputs = model(batch)
        if head == "classification":
            return outputs, torch.nn.functional.cross_entropy(outputs, self.labels)
        real = self.mask.bool()
        if head == "span":
            rows = torch.full((*real.shape, 2), float("-inf"))
            rows = rows.masked_scatter(real[..., None].expand_as(rows), outputs)
            return outputs, self._span_loss(rows[..., 0], rows[..., 1])
        assert isinstance(outputs, TokenOutputs)
        scores = outputs.scores()
        rows = torch.zeros(*real.shape, scores.shape[-1])
        return self._tokens(rows.masked_scatter(real[..., None].expand_as(rows), scores))

    def _span_loss(self, start: Tensor, end: Tensor) -> Tensor:
        """Mean loss over the tokens of each sequence; theirs counts padding among the choices."""
        shut = ~self.mask.bool()
        losses = [
            torch.nn.functional.cross_entropy(scores.masked_fill(shut, float("-inf")), at)
            for scores, at in ((start, self.spans[0]), (end, self.spans[1]))
        ]
        return sum(losses, torch.zeros(())) / 2

    def _tokens(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of real tokens, and the mean loss of each telling the next of its sequence."""
        real = self.mask.bool()
        targets = self.ids[:, 1:].where(real[:, 1:], -100)
        loss = torch.nn.functional.cross_entropy(
            scores[:, :-1].reshape(-1, scores.shape[-1]), targets.reshape(-1), ignore_index=-100
        )
        return scores[real], loss


def _gradient_difference(loaded: Loaded, theirs: Any) -> float:
    """Returns the largest difference of a tensor's gradient, relative to its largest element.

    Some gradients are zero but for rounding, such as those of keys' biases and of a span's scores:
    an element counts as large as a hundredth of the largest of all.
    """
    model, family = loaded.model, loaded.family
    ours: Mapping[str, Tensor | None] = {n: p.grad for n, p in model.named_parameters()}
    there = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False)}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for rule in family.rules(model.config):
        own = [ours.get(name) for name in rule.own]
        names = [rule.other, *rule.aliases]
        names = [f"{family.prefix}{name}" for name in names] + names
        other = next((there[name] for name in names if there.get(name) is not None), None)
        grads = [grad for grad in own if grad is not None]
        if not grads or other is None:
            assert not grads and other is None, f"only one side trains {rule.other}"
            continue
        pairs[rule.other] = dataclasses.replace(rule, plus=0.0).to_other(grads), other
    assert len(pairs) >= 3
    least = 1e-2 * max(float(other.abs().max()) for _, other in pairs.values())
    return max(
        float((own - other).abs().max()) / max(float(other.abs().max()), least)
        for own, other in pairs.values()
    )
