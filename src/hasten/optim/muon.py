"""Muon: steps of the blocks' matrices are orthogonalised, everything else takes AdamW's.

    gradient --momentum--> M (m, n) --Newton-Schulz--> U V^T of its singular value decomposition

A step then moves all directions of a matrix by the same amount, also those whose gradients are
small (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"). Steps are
scaled by ``0.2 * sqrt(max(m, n))``, which makes them about as large as AdamW's, so that both rules
share a learning rate and weight decay (Liu et al. 2025, "Muon is Scalable for LLM Training").

``torch.optim.Muon`` takes matrices only, one at a time, and works in bfloat16, which on a CPU
without such units is many times slower. Here it is the weights' own type, and matrices of one
shape are orthogonalised together.
"""

# pyright: reportPrivateImportUsage=false
# torch's multi-tensor operations (_foreach_*) have no public name as of torch 2.13.

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hasten.core.shards import local_part, local_parts, placed_like, whole

# Coefficients and number of iterations: Jordan et al. They do not converge to singular values of
# exactly 1 but bring them fast to between about 0.7 and 1.2, which serves as well.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of blocks, AdamW for embeddings, heads, norms and biases.

    Args:
        params: groups of (name, parameter); a parameter of two dimensions with ``blocks.`` in its
            name is orthogonalised.
        lr: learning rate of both rules.
        weight_decay: decoupled, of both rules.
        momentum: decay of Muon's momentum, which is Nesterov's.
        betas: of AdamW.
        eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step; parameters without a gradient stay as they are."""
        assert closure is None
        for group in self.param_groups:
            matrices: list[Tensor] = []
            others: list[Tensor] = []
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                is_hidden = parameter.ndim == 2 and "blocks." in name
                (matrices if is_hidden else others).append(parameter)
            if group["weight_decay"] and matrices + others:
                factor = 1 - group["lr"] * group["weight_decay"]
                torch._foreach_mul_(local_parts(matrices + others), factor)
            if matrices:
                self._step_matrices(matrices, group)
            if others:
                self._step_others(others, group)

    def _step_matrices(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        for shape, alike in by_shape.items():
            for matrix in alike:
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            gradients = [local_part(matrix.grad) for matrix in alike if matrix.grad is not None]
            buffers = [self.state[matrix]["momentum_buffer"] for matrix in alike]
            torch._foreach_lerp_(local_parts(buffers), gradients, 1 - group["momentum"])
            torch._foreach_lerp_(gradients, local_parts(buffers), group["momentum"])
            # Only a whole matrix can be orthogonalised; its gradient now is the momentum ahead.
            ahead = [whole(matrix.grad) for matrix in alike if matrix.grad is not None]
            steps = orthogonalise(torch.stack(ahead)).unbind()
            own = [local_part(placed_like(s, m)) for s, m in zip(steps, alike, strict=True)]
            size = -group["lr"] * 0.2 * math.sqrt(max(shape))
            torch._foreach_add_(local_parts(alike), own, alpha=size)

    def _step_others(self, others: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in others:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
        gradients = [local_part(p.grad) for p in others if p.grad is not None]
        means = local_parts(self.state[parameter]["exp_avg"] for parameter in others)
        squares = local_parts(self.state[parameter]["exp_avg_sq"] for parameter in others)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        counts = [self.state[parameter]["step"].item() for parameter in others]
        scales = [-group["lr"] / (1 - beta1**count) for count in counts]
        corrections = [math.sqrt(1 - beta2**count) for count in counts]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, corrections)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(local_parts(others), means, roots, scales)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Returns about ``U V^T`` of each matrix ``U S V^T``, by a Newton-Schulz iteration.

    Args:
        matrices: (B, m, n), float32 or wider.

    Returns:
        (B, m, n), singular values between about 0.7 and 1.2; a zero matrix stays zero.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if is_tall else x
