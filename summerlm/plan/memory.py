"""The memory of a device, part by part, from what a step on it was seen to need.

Flow: `recipes.tracing` gives `Peaks`; `extend` takes them from a shallow model to a deep one;
`spread` deals them over devices that share a model; `Footprint` is what `recipes.planning` shows.
"""

from dataclasses import asdict, dataclass

import torch

from summerlm.model.config import ModelConfig
from summerlm.model.transformer import Transformer

Peaks = dict[str, dict[str, int]]
"""Bytes at the highest moment of each stretch of a step: by stretch, then by kind."""

KINDS = (  # in the order in which people read them
    "weights",
    "copies",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "buffers",
    "batch",
    "gathered",
    "workspace",
)
SHARED_OUT = ("weights", "copies", "gradients", "optimizer")  # of which shards hold a part each


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device at the highest moment of a step.

    Attributes:
        weights: Master weights, float32.
        copies: Copies of weights in the dtype of products, where a layout keeps any.
        gradients: Gradients that exist at that moment.
        optimizer: Moments and step counters.
        activations: What the forward pass keeps of a micro-batch.
        loss: Logits of a chunk, their gradient, and the gradients that the loss makes.
        buffers: Tables of positions.
        batch: Ids, targets and documents of the rows of a step.
        gathered: Weights and gradients of other shards, while they are here.
        workspace: What operations hold for a moment.
        stretch: Which stretch of the step the moment is in.
    """

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    buffers: int
    batch: int
    gathered: int
    workspace: int
    stretch: str

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(value for key, value in asdict(self).items() if key != "stretch")


def extend(shallow: Peaks, deep: Peaks, more: int) -> Peaks:
    """Go on from two depths to a greater one: each stretch grows by the same with each layer.

    Args:
        shallow: Of a model.
        deep: Of the same model with one layer more.
        more: Layers beyond the second model's.

    Returns:
        Of a model with so many layers more.

    Example:
        >>> extend({"loss": {"weights": 10}}, {"loss": {"weights": 14}}, more=2)
        {'loss': {'weights': 22}}
    """
    return {
        stretch: {
            kind: deep[stretch].get(kind, 0)
            + more * (deep[stretch].get(kind, 0) - shallow[stretch].get(kind, 0))
            for kind in {**shallow[stretch], **deep[stretch]}
        }
        for stretch in deep
    }


@dataclass(frozen=True)
class Sharing:
    """How devices share one copy of a model, as `fully_shard` makes them.

    Attributes:
        shards: Devices to a copy, S.
        share: Part of all elements that the fullest of them holds.
        lent: Bytes of others' weights on each at once: embedding, head and final norm in float32,
            and two blocks, the one at work and the next, in the dtype of products.
        whole_gradients: Bytes of gradients before they are shared out: of all weights where
            micro-batches add up, for they travel once a step; else of those at work.
        spared: Bytes of blocks' weights cast for products, which a device alone keeps for the
            backward pass and shards fetch anew.
    """

    shards: int = 1
    share: float = 1.0
    lent: int = 0
    whole_gradients: int = 0
    spared: int = 0


def share_out(config: ModelConfig, shards: int, itemsize: int, micro_batches: int) -> Sharing:
    """Compute what sharding a model adds and takes away.

    Args:
        config: The model's settings.
        shards: Devices to a copy, S.
        itemsize: Bytes of an element of blocks' weights while they multiply.
        micro_batches: Micro-batches of a step.

    Returns:
        The figures of one device.
    """
    if shards == 1:
        return Sharing()
    with torch.device("meta"):
        model = Transformer(config)
    everything = list(model.parameters())
    total = sum(parameter.numel() for parameter in everything)
    # as torch.chunk cuts: whole rows, the first shard has most
    held = sum(-(-len(p) // shards) * p.numel() // len(p) for p in everything)
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    root = total - block * config.layers
    at_work = 4 * root + block * (2 * itemsize + 4)  # two blocks' own, one on its way in float32
    return Sharing(
        shards=shards,
        share=held / total,
        lent=4 * root + 2 * block * itemsize,
        whole_gradients=4 * total if micro_batches > 1 else at_work,
        spared=config.layers * block * itemsize if itemsize < 4 else 0,
    )


def spread(peaks: Peaks, sharing: Sharing) -> Footprint:
    """Find the highest moment of a step on one of the devices that share a model.

    Args:
        peaks: Of a step on a device alone.
        sharing: Over how many the model lies.

    Returns:
        The memory at that moment.
    """
    found = []
    for stretch, kinds in peaks.items():
        assert set(kinds) <= set(KINDS), f"kinds of memory without a name: {set(kinds)}"
        parts = {kind: kinds.get(kind, 0) for kind in KINDS}
        if sharing.shards > 1:
            for kind in SHARED_OUT:
                parts[kind] = round(parts[kind] * sharing.share)
            if stretch not in ("state", "update"):
                parts["gathered"] = sharing.lent + sharing.whole_gradients
                parts["activations"] = max(0, parts["activations"] - sharing.spared)
        found.append(Footprint(**parts, stretch=stretch))
    return max(found, key=lambda footprint: footprint.total)
