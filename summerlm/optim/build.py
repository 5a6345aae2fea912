"""The optimizers of one model behind one face, with their state as named parts.

Flow: `build_optimizer` makes an `OptimizerSet` before the first step; `train` steps it and hands
`OptimizerSet.parts` to the checkpoint, which saves and fills them. All arithmetic is on the rows
that this rank holds; only `muon.Muon` needs whole matrices, and gets them lent.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from summerlm.core.marks import part
from summerlm.core.parts import Part
from summerlm.optim.adamw import AdamW
from summerlm.optim.config import OptimConfig
from summerlm.optim.groups import Group, parameter_groups
from summerlm.optim.muon import Muon


def build_optimizer(
    parts: Mapping[str, Part],
    config: OptimConfig,
    matrices: Mapping[str, tuple[int, ...]],
    shard_group: dist.ProcessGroup | None = None,
) -> "OptimizerSet":
    """Make the optimizers of a model, on the device where its parameters lie.

    Args:
        parts: The rows of each parameter that this rank holds, float32.
        config: Optimizer, rates and decay.
        matrices: For each hidden matrix the row counts of the blocks that Muon orthogonalises
            one by one, as `Transformer.matrix_blocks()` gives them.
        shard_group: The ranks that share the parameters, all of which call this; None where this
            one holds them whole.

    Returns:
        The optimizers, with all state made and zero, at the peak rate.
    """
    groups = parameter_groups(parts, config, matrices)
    return OptimizerSet(groups, config, matrices, shard_group)


class OptimizerSet:
    """AdamW and, where chosen, Muon, stepped together.

    Args:
        groups: What `parameter_groups` returned.
        config: The settings that AdamW's and Muon's arithmetic take.
        matrices: Row counts of each hidden matrix's blocks.
        shard_group: The ranks that share the parameters, or None.
    """

    def __init__(
        self,
        groups: list[Group],
        config: OptimConfig,
        matrices: Mapping[str, tuple[int, ...]],
        shard_group: dist.ProcessGroup | None,
    ) -> None:
        self.groups = groups
        self._shard_group = shard_group
        self._weights = {name: held for group in groups for name, held in group.parts.items()}
        for name, weight in self._weights.items():
            dtype = weight.tensor.dtype
            assert dtype == torch.float32, f"{name} is {dtype}, not float32"
        self._adam = AdamW([group for group in groups if group.optimizer == "adamw"], config)
        self._muons = [
            (group, _muon(group, config, matrices, shard_group))
            for group in groups
            if group.optimizer == "muon"
        ]
        self._factor = 1.0

    def set_rate(self, factor: float) -> None:
        """Set the rate of the next steps.

        Args:
            factor: Share of each group's peak rate, from `schedule.rate_factor`.
        """
        self._factor = factor

    def step(self, gradients: Mapping[str, Tensor], ok: Tensor) -> Tensor:
        """Move every parameter by its gradient, or change nothing; all ranks call this.

        Args:
            gradients: The gradient of each parameter's rows on this rank, summed over ranks.
            ok: Whether to step at all, (), bool, the same on all ranks, on the parameters' device;
                it is never read on the host. Where False, no bit of parameters and state changes,
                whatever the gradients hold.

        Returns:
            The norm of the change of all weights, decay included, (), float32; 0 where skipped.
        """
        for name, weight in self._weights.items():
            assert gradients[name].shape == weight.tensor.shape, f"{name}: a gradient's shape"
        with part("optimizer: AdamW"):
            moved = self._adam.step(gradients, self._factor, ok)
        with part("optimizer: Muon"):
            for group, muon in self._muons:
                moved += muon.step(gradients, group.rate * self._factor, ok)
        if self._shard_group is not None:
            dist.all_reduce(moved, group=self._shard_group)
        return moved.sqrt().float()

    def parts(self) -> dict[str, Part]:
        """Give the whole state, complete from before the first step on.

        Returns:
            "<parameter name>/<state name>" -> this rank's rows, live: "step", (), and "exp_avg",
            "exp_avg_sq" for AdamW, "momentum" for Muon, shaped as the parameter; all float32.
        """
        found = self._adam.parts()
        for _, muon in self._muons:
            found |= muon.parts()
        return found


def _muon(
    group: Group,
    config: OptimConfig,
    matrices: Mapping[str, tuple[int, ...]],
    shard_group: dist.ProcessGroup | None,
) -> Muon:
    return Muon(
        group.parts,
        matrices,
        decay=group.decay,
        momentum=config.momentum,
        dtype=getattr(torch, config.newton_schulz_dtype),
        group=shard_group,
    )
