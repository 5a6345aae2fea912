"""The model that a budget is best spent on: size and tokens by the compute-optimal rule.

Flow: `recipes.planning` turns dollars or days into FLOPs and asks `fit`.

Shapes: D width, L layers, H query heads, K key/value heads, F MLP hidden.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from summerlm.model.config import ModelConfig
from summerlm.plan.count import flops_per_token, parameters

TOKENS_PER_PARAMETER = 20.0  # Hoffmann et al. 2022, arXiv:2203.15556, section 3.4 and table 3
WIDTH_STEP = 128  # a size that matmul kernels like
HIDDEN_STEP = 64
WIDEST = 32_768
FAR = 8  # a ratio that is too low by this factor only falls as models grow
STRETCH = 1.25  # layers may differ from the ladder's ratio by this factor


@dataclass(frozen=True)
class Fitted:
    """A model and how long it is trained.

    Attributes:
        model: Its settings.
        tokens: Targets that the budget buys.
        ratio: Tokens a parameter, which the rule wants near 20.
    """

    model: ModelConfig
    tokens: int
    ratio: float


def fit(config: ModelConfig, flops: float, ratio: float = TOKENS_PER_PARAMETER) -> Fitted:
    """Choose the size of a model whose training on a budget is compute-optimal.

    All shapes keep the proportions of the settings given: width is a multiple of 128, layers
    follow the width, heads have the same channels and share keys and values as before. Among them
    that is taken whose tokens a parameter are nearest the rule's, and whose depth is nearest the
    proportions': the squares of both log-ratios are added.

    Args:
        config: The model whose proportions are kept.
        flops: FLOPs of the budget, forward and backward, as `flops_per_token` counts them.
        ratio: Tokens a parameter that the rule wants.

    Returns:
        The model and its tokens, which spend the budget to one token.

    Raises:
        ValueError: If the budget is too small for the smallest shape, or too large.

    Source:
        Hoffmann et al. 2022, arXiv:2203.15556: parameters and tokens grow alike with compute,
        about 20 tokens a parameter.
    """
    found = min(_shapes(config, flops, ratio), key=lambda fitted: _miss(fitted, config, ratio))
    if not ratio / 2 <= found.ratio <= ratio * 2:
        size = "small" if found.ratio < ratio else "large"
        raise ValueError(
            f"{flops:.3g} FLOPs are too {size} a budget for a model of these proportions: the "
            f"nearest has {parameters(found.model):,} parameters, {found.ratio:.3g} tokens each"
        )
    return found


def least_flops(config: ModelConfig, ratio: float = TOKENS_PER_PARAMETER) -> float:
    """Give a budget that is enough for the smallest shape of a model's proportions.

    Args:
        config: The model whose proportions are kept.
        ratio: Tokens a parameter that the rule wants.

    Returns:
        FLOPs, for `fit`.
    """
    smallest = next(_shapes(config, 1.0, ratio)).model
    return ratio * parameters(smallest) * flops_per_token(smallest)


def _miss(fitted: Fitted, config: ModelConfig, ratio: float) -> float:
    depth = fitted.model.layers / fitted.model.width * config.width / config.layers
    return math.log(max(fitted.ratio, 1e-9) / ratio) ** 2 + math.log(depth) ** 2


def _shapes(config: ModelConfig, flops: float, ratio: float) -> Iterator[Fitted]:
    """Give all shapes of about the settings' proportions, up to those too large by far."""
    group = config.heads // config.kv_heads
    for width in range(WIDTH_STEP, WIDEST + 1, WIDTH_STEP):
        scale = width / config.width
        kv_heads = max(1, round(config.kv_heads * scale))
        hidden = max(1, round(config.mlp_hidden * scale / HIDDEN_STEP)) * HIDDEN_STEP
        shape = {
            "width": width,
            "heads": kv_heads * group,
            "kv_heads": kv_heads,
            "mlp_hidden": hidden,
        }
        one, two = (parameters(config.model_copy(update={**shape, "layers": n})) for n in (1, 2))
        ratios = []
        lowest, highest = config.layers * scale / STRETCH, config.layers * scale * STRETCH
        for layers in range(max(1, math.ceil(lowest)), max(1, int(highest)) + 1):
            model = config.model_copy(update={**shape, "layers": layers})
            tokens = int(flops / flops_per_token(model))
            ratios.append(tokens / (one + (layers - 1) * (two - one)))
            yield Fitted(model, tokens, ratios[-1])
        if ratios and max(ratios) < ratio / FAR:
            return
