"""The optimizers of one model behind one face, with their state as named tensors.

Flow: `build_optimizer` makes an `OptimizerSet` before the first step; `train` sets its rate,
steps it, and hands `OptimizerSet.tensors` to the checkpoint, which saves and fills them.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from summerlm.optim.config import OptimConfig
from summerlm.optim.groups import Group, parameter_groups
from summerlm.optim.muon import Muon


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    matrices: Mapping[str, tuple[int, ...]],
) -> "OptimizerSet":
    """Make the optimizers of a model, on the device where its parameters lie.

    Args:
        named_parameters: The model's `named_parameters()`, float32.
        config: Optimizer, rates and decay.
        matrices: For each hidden matrix the row counts of the blocks that Muon orthogonalises
            one by one, as `Transformer.matrix_blocks()` gives them.

    Returns:
        The optimizers, with all state made and zero, at the peak rate.
    """
    return OptimizerSet(parameter_groups(named_parameters, config, matrices), config, matrices)


class OptimizerSet:
    """AdamW and, where chosen, Muon, stepped together.

    Args:
        groups: What `parameter_groups` returned.
        config: The settings that AdamW's and Muon's arithmetic take.
        matrices: Row counts of each hidden matrix's blocks.
    """

    def __init__(
        self,
        groups: list[Group],
        config: OptimConfig,
        matrices: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.groups = groups
        self._parameters = {name: p for group in groups for name, p in group.parameters.items()}
        for name, parameter in self._parameters.items():
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}, not float32"
        self._adam = _adamw([group for group in groups if group.optimizer == "adamw"], config)
        self._muons = [
            (group, _muon(group, config, matrices)) for group in groups if group.optimizer == "muon"
        ]
        self._factor = 1.0

    def set_rate(self, factor: float) -> None:
        """Set the rate of the next steps.

        Args:
            factor: Share of each group's peak rate, from `schedule.rate_factor`.
        """
        self._factor = factor
        for group in self._adam.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def step(self, ok: Tensor) -> None:
        """Move every parameter by its gradient, or change nothing.

        Args:
            ok: Whether to step at all, (), bool, on the parameters' device; it is never read on
                the host. Where False, no bit of parameters and state changes, whatever the
                gradients hold.
        """
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
        self._adam.found_inf = (~ok).float()  # type: ignore[attr-defined]  # the kernel reads it
        self._adam.step()
        for group, muon in self._muons:
            muon.step(group.rate * self._factor, ok)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Give the whole state, complete from before the first step on.

        Returns:
            "<parameter name>/<state name>" -> the live tensor: "step", (), and "exp_avg",
            "exp_avg_sq" for AdamW, "momentum" for Muon, shaped as the parameter; all float32.
        """
        found = {f"{n}/momentum": b for _, muon in self._muons for n, b in muon.buffers.items()}
        for name, parameter in self._parameters.items():
            for key, tensor in self._adam.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = tensor
        return found


def _adamw(groups: list[Group], config: OptimConfig) -> torch.optim.AdamW:
    adam = torch.optim.AdamW(
        [
            {
                "params": list(group.parameters.values()),
                "lr": group.rate,
                "peak_lr": group.rate,
                "weight_decay": group.decay,
            }
            for group in groups
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in (p for group in groups for p in group.parameters.values()):
        # made here as torch makes it in its first step, so that a checkpoint knows all shapes
        adam.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return adam


def _muon(group: Group, config: OptimConfig, matrices: Mapping[str, tuple[int, ...]]) -> Muon:
    return Muon(
        group.parameters,
        matrices,
        decay=group.decay,
        momentum=config.momentum,
        dtype=getattr(torch, config.newton_schulz_dtype),
    )
