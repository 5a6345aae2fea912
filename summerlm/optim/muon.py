"""Muon: momentum whose matrices are made orthogonal before they move the weights.

Flow: `build.OptimizerSet` owns one `Muon` for each group of hidden matrices, beside AdamW.
    1. Matrices are cut into blocks (q, k, v; gate, up), and each block has an owner among the
       ranks that share the matrices (`exchange.deal`); a rank alone owns all;
    2. gradients update the momentum, in float32, on the rows that each rank holds;
    3. the blend of both goes to the owners (`exchange.Exchange`), where `orthogonalize` turns
       blocks of one shape, a stack, into nearly orthogonal updates, which come back;
    4. weights decay and move, unless the step is skipped.

Shapes: n blocks in a stack, R rows and S columns of a block with R <= S (tall blocks are
transposed on their way into a stack); r of its rows that a rank holds.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from summerlm.core.parts import Part
from summerlm.optim.exchange import Block, Exchange, deal

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0: five rounds reach 0.7 to 1.2
ROUNDS = 5
NORM_FLOOR = 1e-7  # keeps an all-zero gradient zero
STACK_ELEMENTS = 2**26  # of one owner's blocks in a round, if several: bounds the working memory


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
        parts: Rows of matrices by name, (rows held, columns), float32.
        blocks: For each name the row counts of the blocks that are orthogonalised one by one.
        decay: Share of a weight that a step at rate 1 takes away.
        momentum: Share of the old mean gradient that a step keeps.
        dtype: Arithmetic of the iteration, and what travels; weights and momentum stay float32.
        group: The ranks that share the matrices; None where this one holds them whole.

    Source:
        Jordan et al. 2024 (as in `orthogonalize`); Liu et al. 2025, arXiv:2502.16982, section
        2.2 (matching AdamW's update size); equal to `torch.optim.Muon` with
        adjust_lr_fn="match_rms_adamw" on a matrix of one block.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        blocks: Mapping[str, tuple[int, ...]],
        *,
        decay: float,
        momentum: float,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.decay = decay
        self.momentum = momentum
        self.dtype = dtype
        self._parts = dict(parts)
        self._weights = {name: part.tensor.detach() for name, part in parts.items()}
        self.buffers = {name: torch.zeros_like(w) for name, w in self._weights.items()}
        mine = {name: (part.start, part.stop) for name, part in parts.items()}
        held: list[Any] = [mine]
        if group is not None:
            held = [None] * dist.get_world_size(group)
            dist.all_gather_object(held, mine, group=group)
        rank = dist.get_rank(group) if group is not None else 0
        cut = [block for name, part in parts.items() for block in _cut(name, part, blocks[name])]
        rounds = deal(cut, len(held), STACK_ELEMENTS)
        self._rounds = [Exchange(owned, held, rank, group) for owned in rounds]

    def parts(self) -> dict[str, Part]:
        """Give the state: "<parameter>/momentum" -> its rows on this rank."""
        return {f"{n}/momentum": part.like(self.buffers[n]) for n, part in self._parts.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rate: float, ok: Tensor) -> Tensor:
        """Move the weights by one step; all ranks of the group call this.

        Args:
            gradients: At least those of its matrices, shaped as the rows held.
            rate: Step size.
            ok: Whether to step at all, (), bool; where False, nothing changes.

        Returns:
            Sum of the squares of the weights' changes here, (), float64.
        """
        moved: list[Tensor] = []
        for exchange in self._rounds:
            w, m, g = (exchange.pieces(t) for t in (self._weights, self.buffers, gradients))
            new_m = torch._foreach_lerp(m, g, 1 - self.momentum)
            blend = torch._foreach_lerp(g, new_m, self.momentum)
            updates = exchange.at_owners([b.to(self.dtype) for b in blend], self._orthogonal)
            new_w = torch._foreach_mul(w, 1 - rate * self.decay)
            for new, update, longer in zip(new_w, updates, exchange.longer, strict=True):
                # an orthogonal update's own size is 1 / sqrt(S)
                new.add_(update, alpha=-rate * 0.2 * math.sqrt(longer))
            moved += torch._foreach_norm(torch._foreach_sub(new_w, w))
            # select, never multiply by zero: a skipped step's gradients may be NaN
            for old, new in zip((*m, *w), (*new_m, *new_w), strict=True):
                old.copy_(torch.where(ok, new, old))
        return torch.where(ok, torch.stack(moved).double().square().sum(), 0.0)

    def _orthogonal(self, blocks: list[Tensor]) -> list[Tensor]:
        """Orthogonalise whole blocks, those of one shape at once."""
        wide = [block.mT if block.shape[0] > block.shape[1] else block for block in blocks]
        alike: dict[torch.Size, list[int]] = defaultdict(list)
        for index, block in enumerate(wide):
            alike[block.shape].append(index)
        updates: dict[int, Tensor] = {}
        for indices in alike.values():
            stack = orthogonalize(torch.stack([wide[i] for i in indices]), self.dtype)
            updates |= zip(indices, stack.unbind(), strict=True)
        return [
            updates[i].mT if block is not wide[i] else updates[i] for i, block in enumerate(blocks)
        ]


def _cut(name: str, part: Part, rows: Iterable[int]) -> Iterator[Block]:
    """Cut a matrix into its blocks."""
    stop = 0
    for count in rows:
        yield Block(name, stop, stop := stop + count, part.shape[1])
    assert stop == part.shape[0], f"{name}: blocks {rows} miss its {part.shape[0]} rows"
