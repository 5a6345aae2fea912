"""One optimizer step: micro-batches to gradients, one division, one check, one update.

Flow:
    1. `Stepper` splits this rank's rows into micro-batches and sums their losses' gradients;
    2. each loss is a sum over targets, divided by the count of the step over all ranks, so that the
       gradient depends neither on the split nor on the ranks; `parallel.layout` adds gradients up
       over ranks once, in the last micro-batch's backward pass;
    3. one small message adds up the losses and the squares of the gradients over ranks;
    4. the gradients are clipped; loss and norm are checked on the device, where all ranks come to
       the same verdict, and the optimizer updates only if both are finite and within limits;
    5. before it does, `before_update` may hold it back: a save copies the weights while the
       gradients are made;
    6. nothing waits for the device: `StepResult` holds tensors that the loop reads later.

Shapes: B rows of this rank, T positions, D model width, S sources.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from summerlm.core.marks import part
from summerlm.core.ranks import Ranks
from summerlm.core.runtime import derive_seed
from summerlm.data.batch import IGNORE, Batch
from summerlm.model.loss import next_token_loss
from summerlm.optim.build import OptimizerSet
from summerlm.parallel.layout import Layout
from summerlm.train.config import TrainConfig

CLIP_FLOOR = 1e-6  # added to the norm that is divided by, as torch's own clipping does


@dataclass(frozen=True)
class Limits:
    """Beyond which a step is not made.

    Attributes:
        loss: Mean cross-entropy in nats.
        norm: Gradient norm before clipping.
    """

    loss: float = math.inf
    norm: float = math.inf


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself, still on the device, over all ranks where it isn't said.

    Attributes:
        loss: Mean cross-entropy of the step's targets in nats, (), float32.
        grad_norm: Gradient norm before clipping, (), float32.
        update_norm: Norm of the change of all weights, (), float32; 0 where none was made.
        ok: Whether loss and norm were finite and within limits and the update was made, (), bool.
        source_nats: Summed cross-entropy by source, (S,), float64.
        source_targets: Targets that counted, by source, (S,), int64.
        row_nats: Summed cross-entropy of each of this rank's rows, (B,), float32.
        row_targets: Targets that counted in each of this rank's rows, (B,), int64.
        own_s: Seconds until this rank began its last backward pass, in which ranks wait for each
            other; on a GPU, which works behind the host, this is the host's time.
    """

    loss: Tensor
    grad_norm: Tensor
    update_norm: Tensor
    ok: Tensor
    source_nats: Tensor
    source_targets: Tensor
    row_nats: Tensor
    row_targets: Tensor
    own_s: float


class Stepper:
    """Makes optimizer steps of one model.

    Args:
        layout: The model over its ranks, in training mode.
        optimizer: Its optimizer.
        config: Loss, clipping and chunk size.
        ranks: The job.
        seed: The run's seed, from which each step's dropout draws.
        dtype: Autocast's dtype, or None for float32.
        micro_rows: Rows of a micro-batch, or None for all of a rank's rows at once.
        sources: How many data sources there are, S.
        before_update: Called before weights or moments change.
    """

    def __init__(
        self,
        layout: Layout,
        optimizer: OptimizerSet,
        config: TrainConfig,
        ranks: Ranks,
        *,
        seed: int,
        dtype: torch.dtype | None,
        micro_rows: int | None,
        sources: int,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.optimizer = optimizer
        self._config = config
        self._ranks = ranks
        self._seed = seed
        self._dtype = dtype
        self._micro_rows = micro_rows
        self._sources = sources
        self._before_update = before_update
        self._settled = not layout.settles

    def __call__(
        self, batch: Batch, number: int, rate: float, *, count: int, limits: Limits | None = None
    ) -> StepResult:
        """Make one step; all ranks call this, with as many rows each.

        Args:
            batch: This rank's rows of the step, on the model's device.
            number: The step's number, from 1.
            rate: The schedule's factor on all learning rates.
            count: Targets of the step that count, over all ranks.
            limits: Beyond which the step is not made; None for no limits.

        Returns:
            Loss, norms and verdict, not yet read from the device.
        """
        micros = batch.split(self._micro_rows or len(batch.tokens))
        self.layout.rest()
        self._settle(micros[0], number)
        row_nats, own_s = self._backward(micros, number, count)
        row_targets = (batch.targets != IGNORE).sum(dim=1)
        gradients = self.layout.gradients()
        with part("gradient norm, clip"):
            nats, targets, squares = self._sums(batch.sources, row_nats, row_targets, gradients)
            loss, norm = (nats.sum() / count).float(), squares.sqrt().float()
            self._clip(gradients.values(), norm)
        limits = limits or Limits()
        ok = torch.isfinite(loss) & torch.isfinite(norm)
        ok &= (loss <= limits.loss) & (norm <= limits.norm)
        self.optimizer.set_rate(rate)
        self._before_update()
        update_norm = self.optimizer.step(gradients, ok)
        return StepResult(
            loss=loss,
            grad_norm=norm,
            update_norm=update_norm,
            ok=ok,
            source_nats=nats,
            source_targets=targets,
            row_nats=row_nats,
            row_targets=row_targets,
            own_s=own_s,
        )

    def _settle(self, micro: Batch, number: int) -> None:
        """Let a layout decide its order of sums in a pass that is forgotten, once a process.

        Else the first step after a restart would add up in another order than the same step of a
        run that was never stopped.
        """
        if not self._settled:
            self._backward([micro], number, 1)
            self._settled = True

    def _backward(self, micros: list[Batch], number: int, count: int) -> tuple[Tensor, float]:
        """Make gradients; gives the cross-entropy of each row, (B,), and the seconds of its own."""
        start = time.monotonic()
        for parameter in self.layout.model.parameters():
            parameter.grad = None
        row_nats = []
        for index, micro in enumerate(micros):
            parts = (self._ranks.rank,) if self._ranks.world > 1 else ()  # masks of its own
            torch.manual_seed(derive_seed(self._seed, "dropout", number, index, *parts))
            with self.layout.reducing(index == len(micros) - 1):
                objective, per_target = self._forward(micro)
                own_s = time.monotonic() - start
                (objective / count).backward()
            del objective  # it holds the loss's gradients, which the next pass has no room for
            row_nats.append(per_target.sum(dim=1))
        return torch.cat(row_nats), own_s

    def _forward(self, micro: Batch) -> tuple[Tensor, Tensor]:
        """Give a micro-batch's objective, (), and its cross-entropy by target, (B, T)."""
        device_type = micro.tokens.device.type
        model = self.layout.model
        enabled = self._dtype is not None
        with torch.autocast(device_type, dtype=self._dtype, enabled=enabled):
            hidden = self.layout(micro.tokens, micro.documents)  # (B, T, D)
            with part("head and loss"):
                loss = next_token_loss(
                    hidden.flatten(0, 1),
                    model.head_weight,
                    micro.targets.flatten(),
                    vocabulary=model.config.vocabulary,
                    soft_cap=model.config.logit_soft_cap,
                    z_loss=self._config.z_loss,
                    chunk_tokens=self._config.loss_chunk_tokens,
                    compiled=self.layout.compiled,
                )
        return loss.total, loss.per_target.view_as(micro.targets)

    def _sums(
        self, sources: Tensor, nats: Tensor, targets: Tensor, gradients: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add up over ranks, in one message.

        Args:
            sources: Source of each row, (B,).
            nats: Cross-entropy of each row, (B,).
            targets: Targets that count in each row, (B,).
            gradients: Of this rank's parts.

        Returns:
            Cross-entropy by source, (S,), targets by source, (S,), squares of the gradient, ().
        """
        sums = torch.zeros(2 * self._sources + 1, dtype=torch.float64, device=nats.device)
        sums.index_add_(0, sources, nats.double())
        sums.index_add_(0, sources + self._sources, targets.double())
        norms = torch._foreach_norm(list(gradients.values()))
        # replicas hold the same gradients: each gives its share
        sums[-1] = torch.stack(norms).double().square().sum() / self.layout.replicas
        self._ranks.sum(sums)
        by_source, by_target = sums[: self._sources], sums[self._sources : -1]
        return by_source, by_target.long(), sums[-1]

    def _clip(self, gradients: Iterable[Tensor], norm: Tensor) -> None:
        """Scale gradients down to the largest norm allowed."""
        if self._config.clip_norm is not None:
            factor = (self._config.clip_norm / (norm + CLIP_FLOOR)).clamp(max=1.0)
            torch._foreach_mul_(list(gradients), factor)
