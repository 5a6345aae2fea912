"""One optimizer step: micro-batches to gradients, one division, one check, one update.

Flow:
    1. `Stepper` splits the batch into micro-batches and sums their losses' gradients;
    2. each loss is a sum over targets, divided by the count of the whole batch, so that the
       gradient does not depend on the split;
    3. the gradient norm is measured and clipped;
    4. loss and norm are checked on the device, and the optimizer updates only if both are finite;
    5. nothing waits for the device: `StepResult` holds tensors that the loop reads later.

Shapes: B rows, T positions, D model width, S sources.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from summerlm.core.runtime import derive_seed
from summerlm.data.batch import IGNORE, Batch
from summerlm.model.loss import next_token_loss
from summerlm.model.transformer import Transformer
from summerlm.optim.build import OptimizerSet
from summerlm.train.config import TrainConfig


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself, still on the device.

    Attributes:
        loss: Mean cross-entropy of the step's targets in nats, (), float32.
        grad_norm: Gradient norm before clipping, (), float32.
        ok: Whether loss and norm were finite and the update was made, (), bool.
        source_nats: Summed cross-entropy by source, (S,), float32.
        source_targets: Targets that counted, by source, (S,), int64.
    """

    loss: Tensor
    grad_norm: Tensor
    ok: Tensor
    source_nats: Tensor
    source_targets: Tensor


class Stepper:
    """Makes optimizer steps of one model.

    Args:
        model: The model, in training mode.
        optimizer: Its optimizer.
        config: Loss, clipping and chunk size.
        seed: The run's seed, from which each step's dropout draws.
        dtype: Autocast's dtype, or None for float32.
        micro_rows: Rows of a micro-batch, or None for the whole batch at once.
        sources: How many data sources there are, S.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: OptimizerSet,
        config: TrainConfig,
        *,
        seed: int,
        dtype: torch.dtype | None,
        micro_rows: int | None,
        sources: int,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self._config = config
        self._seed = seed
        self._dtype = dtype
        self._micro_rows = micro_rows
        self._sources = sources

    def __call__(self, batch: Batch, number: int, rate: float) -> StepResult:
        """Make one step.

        Args:
            batch: The step's whole batch, on the model's device.
            number: The step's number, from 1.
            rate: The schedule's factor on all learning rates.

        Returns:
            Loss, norm and verdict, not yet read from the device.
        """
        count = (batch.targets != IGNORE).sum()
        nats = torch.zeros(self._sources, device=count.device)
        targets = torch.zeros(self._sources, dtype=torch.int64, device=count.device)
        self.optimizer.zero_grad()
        rows = self._micro_rows or batch.tokens.shape[0]
        for index, micro in enumerate(batch.split(rows)):
            torch.manual_seed(derive_seed(self._seed, "dropout", number, index))
            objective, per_target = self._forward(micro)
            (objective / count).backward()
            nats.index_add_(0, micro.sources, per_target.sum(dim=1))
            targets.index_add_(0, micro.sources, (micro.targets != IGNORE).sum(dim=1))
        loss = nats.sum() / count
        norm = self._clip()
        ok = torch.isfinite(loss) & torch.isfinite(norm)
        self.optimizer.set_rate(rate)
        self.optimizer.step(ok)
        return StepResult(loss, norm, ok, nats, targets)

    def _forward(self, micro: Batch) -> tuple[Tensor, Tensor]:
        """Give a micro-batch's objective, (), and its cross-entropy by target, (B, T)."""
        device_type = micro.tokens.device.type
        enabled = self._dtype is not None
        with torch.autocast(device_type, dtype=self._dtype, enabled=enabled):
            hidden = self.model(micro.tokens, micro.documents)  # (B, T, D)
            loss = next_token_loss(
                hidden.flatten(0, 1),
                self.model.head_weight,
                micro.targets.flatten(),
                vocabulary=self.model.config.vocabulary,
                soft_cap=self.model.config.logit_soft_cap,
                z_loss=self._config.z_loss,
                chunk_tokens=self._config.loss_chunk_tokens,
            )
        return loss.total, loss.per_target.view_as(micro.targets)

    def _clip(self) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._config.clip_norm, norm)
        return norm
