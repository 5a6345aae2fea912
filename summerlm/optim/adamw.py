"""AdamW over the rows that this rank holds: torch's fused kernel, and how far it moved them.

Flow: `build.OptimizerSet` owns one `AdamW` for everything that Muon doesn't train.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from summerlm.core.parts import Part
from summerlm.optim.config import OptimConfig
from summerlm.optim.groups import Group

CHUNK_ELEMENTS = 2**20  # of which `AdamW.moved` computes at once: they fit a cache


class AdamW:
    """Decoupled weight decay and Adam's moments; a skipped step changes no bit.

    Args:
        groups: Parameters with their rates and decays.
        config: Betas and epsilon.

    Source:
        Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    def __init__(self, groups: Iterable[Group], config: OptimConfig) -> None:
        self._config = config
        self._parts = {name: part for group in groups for name, part in group.parts.items()}
        # aliases of the parameters' storage: plain, whatever wraps the parameters
        self._weights = {name: part.tensor.detach() for name, part in self._parts.items()}
        self._adam = torch.optim.AdamW(
            [
                {
                    "params": [self._weights[name] for name in group.parts],
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
        for weight in self._weights.values():
            # made here as torch makes it in its first step, so that a checkpoint knows all shapes
            self._adam.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    def step(self, gradients: Mapping[str, Tensor], factor: float, ok: Tensor) -> Tensor:
        """Move the weights by one step.

        Args:
            gradients: At least those of its parameters, shaped as the rows held.
            factor: Share of each group's peak rate.
            ok: Whether to step at all, (), bool; where False, nothing changes.

        Returns:
            Sum of the squares of the weights' changes here, (), float64.
        """
        for name, weight in self._weights.items():
            weight.grad = gradients[name]
        for group in self._adam.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self._adam.found_inf = (~ok).float()  # type: ignore[attr-defined]  # the kernel reads it
        self._adam.step()
        for weight in self._weights.values():
            weight.grad = None
        return torch.where(ok, self._moved(), 0.0)

    def parts(self) -> dict[str, Part]:
        """Give the state: of each parameter "/step", (), "/exp_avg" and "/exp_avg_sq"."""
        return {
            f"{name}/{key}": part.like(tensor) if key != "step" else Part.whole(tensor)
            for name, part in self._parts.items()
            for key, tensor in self._adam.state[self._weights[name]].items()
        }

    @torch.no_grad()
    def _moved(self) -> Tensor:
        """Sum the squares of the last step's changes, (), float64: from what the step left.

        With m, v the moments, c1 = 1 - beta1^t, c2 = 1 - beta2^t and u = m / c1 / (sqrt(v / c2) +
        eps), the step was w' = w - rate * (decay * w + u), so that
        w' - w = -rate * (decay * w' + u) / (1 - rate * decay); no copy of w is needed.
        """
        sums = []
        for group in self._adam.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            states = [self._adam.state[weight] for weight in group["params"]]
            step = states[0]["step"]  # all have made as many
            c1, root = 1 - self._config.beta1**step, (1 - self._config.beta2**step).sqrt()
            eps, share = self._config.eps * root, decay * c1 / root
            norms: list[Tensor] = []
            for w, m, v in _portions(group["params"], states):
                u = torch._foreach_sqrt(v)
                torch._foreach_add_(u, [eps] * len(u))  # a list: a single tensor would be read
                u = torch._foreach_div(m, u)
                if decay:
                    torch._foreach_add_(u, torch._foreach_mul(w, [share] * len(w)))
                norms += torch._foreach_norm(u)
            scale = root / c1 * (rate / (1 - rate * decay))
            sums.append((torch.stack(norms) * scale).double().square().sum())
        return torch.stack(sums).sum()


def _portions(
    weights: Iterable[Tensor], states: Iterable[Mapping[str, Tensor]]
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Cut weights and their two moments into pieces, and hand out a limited number at once."""
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    total = 0
    for weight, state in zip(weights, states, strict=True):
        tensors = (weight, state["exp_avg"], state["exp_avg_sq"])
        for piece in zip(*(t.view(-1).split(CHUNK_ELEMENTS) for t in tensors), strict=True):
            if pieces and total + piece[0].numel() > CHUNK_ELEMENTS:
                yield _columns(pieces)
                pieces, total = [], 0
            pieces.append(piece)
            total += piece[0].numel()
    yield _columns(pieces)


def _columns(
    rows: list[tuple[Tensor, Tensor, Tensor]],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    w, m, v = map(list, zip(*rows, strict=True))
    return w, m, v
