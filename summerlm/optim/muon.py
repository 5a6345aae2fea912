"""Muon: momentum whose matrices are made orthogonal before they move the weights.

Flow: `build.OptimizerSet` owns one `Muon` for each group of hidden matrices, beside AdamW.
    1. Matrices are cut into blocks (q, k, v; gate, up) and blocks of one shape form stacks;
    2. a stack's gradients update its momentum, in float32;
    3. `orthogonalize` turns the momentum into a nearly orthogonal update, a stack at once;
    4. weights decay and move, unless the step is skipped.

Shapes: n blocks in a stack, R rows and S columns of a block with R <= S (tall blocks are
transposed on their way into a stack).
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0: five rounds reach 0.7 to 1.2
ROUNDS = 5
NORM_FLOOR = 1e-7  # keeps an all-zero gradient zero
STACK_ELEMENTS = 2**26  # of a stack with more than one block at most: bounds the working memory


class Block(NamedTuple):
    """Rows of a matrix that are orthogonalised by themselves."""

    name: str
    start: int
    stop: int

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """View the block in the tensor of its name, (R, S), a tall one transposed."""
        rows = tensors[self.name][self.start : self.stop]
        return rows.mT if rows.shape[0] > rows.shape[1] else rows


def orthogonalize(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace the singular values of each matrix by numbers near 1.

    Args:
        stack: Matrices, (n, R, S) with R <= S, any float dtype.
        dtype: Arithmetic of the iteration.

    Returns:
        The nearly orthogonal matrices, same shape, in `dtype`; zero where the input is zero.

    Source:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = COEFFICIENTS
    x = stack.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=NORM_FLOOR)  # spectral norm at most 1
    for _ in range(ROUNDS):
        gram = x @ x.mT  # (n, R, R)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


class Muon:
    """Momentum, orthogonalised block by block.

    An update has the root mean square of 0.2 that AdamW's usually has, whatever the block's
    shape, so that one rate and decay serve both.

    Args:
        parameters: Matrices by name, (rows, columns), float32.
        blocks: For each name the row counts of the blocks that are orthogonalised one by one.
        decay: Share of a weight that a step at rate 1 takes away.
        momentum: Share of the old mean gradient that a step keeps.
        dtype: Arithmetic of the iteration; weights and momentum stay float32.

    Source:
        Jordan et al. 2024 (as in `orthogonalize`); Liu et al. 2025, arXiv:2502.16982, section
        2.2 (matching AdamW's update size); equal to `torch.optim.Muon` with
        adjust_lr_fn="match_rms_adamw" on a matrix of one block.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        blocks: Mapping[str, tuple[int, ...]],
        *,
        decay: float,
        momentum: float,
        dtype: torch.dtype,
    ) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.momentum = momentum
        self.dtype = dtype
        self.buffers = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._stacks = list(_stacks(self.parameters, blocks))

    @torch.no_grad()
    def step(self, rate: float, ok: Tensor) -> None:
        """Move the weights by one step.

        Args:
            rate: Step size.
            ok: Whether to step at all, (), bool; where False, nothing changes.
        """
        # `OptimizerSet.step` has made sure that none is missing
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for stack in self._stacks:
            weights = [block.of(self.parameters) for block in stack]
            buffers = [block.of(self.buffers) for block in stack]
            w, m = torch.stack(weights), torch.stack(buffers)  # (n, R, S)
            g = torch.stack([block.of(gradients) for block in stack])

            new_m = m.lerp(g, 1 - self.momentum)
            update = orthogonalize(g.lerp(new_m, self.momentum), self.dtype)
            size = 0.2 * math.sqrt(w.shape[2])  # an orthogonal update's own is 1 / sqrt(S)
            new_w = (w * (1 - rate * self.decay)).add_(update, alpha=-rate * size)

            # select, never multiply by zero: a skipped step's gradients may be NaN
            _write(buffers, torch.where(ok, new_m, m))
            _write(weights, torch.where(ok, new_w, w))


def _stacks(
    parameters: Mapping[str, Tensor], blocks: Mapping[str, tuple[int, ...]]
) -> Iterator[list[Block]]:
    """Put blocks of one shape together, a limited number in each stack."""
    alike: dict[torch.Size, list[Block]] = defaultdict(list)
    for name, parameter in parameters.items():
        stop = 0
        for rows in blocks[name]:
            block = Block(name, stop, stop := stop + rows)
            alike[block.of(parameters).shape].append(block)
        assert stop == len(parameter), (
            f"{name}: blocks {blocks[name]} miss its {len(parameter)} rows"
        )
    for shape, members in alike.items():
        size = max(1, STACK_ELEMENTS // shape.numel())
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _write(views: list[Tensor], stack: Tensor) -> None:
    for view, value in zip(views, stack.unbind(), strict=True):
        view.copy_(value)
