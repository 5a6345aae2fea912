"""What memory a run's own step needs, found by making one on tensors without values.

Flow: `planning` and `choosing` call `trace_step`, which
    1. lays out model and optimizer and makes a step of `train.step` under torch's fake tensors and
       a `Tally`: nothing is computed and nothing allocated, but every tensor is counted;
    2. does so for a model of few layers and one of one layer more, and extends both to the depth
       asked for, stretch by stretch of the step (`memory.extend`);
    3. adds what an update needs, which grows with depth only to a limit.
So the figures follow the code of model, loss and optimizer by themselves.

Shapes: B rows of a micro-batch, T positions.
"""

from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from summerlm.core.ranks import ALONE
from summerlm.data.batch import Batch
from summerlm.model.config import ModelConfig
from summerlm.model.transformer import Block, Transformer
from summerlm.optim.build import OptimizerSet, build_optimizer
from summerlm.optim.config import OptimConfig
from summerlm.optim.muon import STACK_ELEMENTS
from summerlm.parallel.attention import choose_kernel
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.layout import Layout
from summerlm.parallel.recompute import recompute_blocks
from summerlm.plan.memory import Peaks, extend
from summerlm.plan.tally import Tally
from summerlm.recipes.settings import Settings
from summerlm.train.step import Stepper

ALL = -1  # the key of all parameters, where others are a block's number
FEW_LAYERS = 4  # are traced as they are; a deeper model is extended from this many and one less
CPU = torch.device("cpu")  # fake tensors need a device whose backward engine is built in


def trace_step(
    settings: Settings, rows: int, micro_batches: int, dtype: torch.dtype | None, *, gpu: bool
) -> Peaks:
    """Find the most memory that each stretch of a step needs, on one device that shares nothing.

    Compiled blocks can't be traced: what they keep is taken for what selective recomputation
    keeps, for inductor too computes elementwise operations anew rather than keep their results.

    Args:
        settings: The run's settings.
        rows: Rows of a micro-batch, B.
        micro_batches: Micro-batches of a step.
        dtype: Autocast's dtype, or None for float32.
        gpu: Whether the step is to run on a GPU, whatever is here.

    Returns:
        Bytes by stretch and kind.
    """
    settings = _traceable(settings, dtype, gpu)
    layers = settings.model.layers
    micro_batches = min(micro_batches, 2)  # the third finds what the second found
    trace = partial(_trace, settings, rows, micro_batches, dtype)
    if layers <= FEW_LAYERS:
        return trace(layers)
    peaks = extend(trace(FEW_LAYERS - 1), trace(FEW_LAYERS), layers - FEW_LAYERS)
    peaks["update"]["workspace"] = _trace_update(settings.model, settings.optim)
    return peaks


def _traceable(settings: Settings, dtype: torch.dtype | None, gpu: bool) -> Settings:
    """Put in place of what can't be traced what needs the same memory."""
    parallel, model = settings.parallel, settings.model
    kernel: str = parallel.attention
    if gpu:
        # the CPU's flash kernel keeps what the GPUs' fused kernels keep: queries, keys, values,
        # averages and a logarithm a row; dropped probabilities are drawn anew, never kept
        kernel = "plain" if kernel == "plain" else "flash"
    else:
        kernel = choose_kernel(kernel, model, CPU, dtype)
    recompute = parallel.recompute or ("selective" if parallel.compile else None)
    changes = {"attention": kernel, "recompute": recompute}
    return settings.model_copy(update={"parallel": parallel.model_copy(update=changes)})


def _trace(
    settings: Settings,
    rows: int,
    micro_batches: int,
    dtype: torch.dtype | None,
    layers: int,
) -> Peaks:
    """Make one step of a model of so many layers without computing it."""
    with FakeTensorMode(), Tally("copies", "state") as tally:
        layout, optimizer = _lay_out(
            settings.model, settings.parallel, settings.optim, layers, tally
        )
        tally.kind = "batch"
        ids = torch.zeros(rows * micro_batches, settings.model.context, dtype=torch.int64)
        sources = torch.zeros(len(ids), dtype=torch.int64)
        batch = Batch(ids, ids.clone(), ids.clone(), sources)
        stepper = Stepper(
            layout,
            optimizer,
            settings.train,
            ALONE,
            seed=0,
            dtype=dtype,
            micro_rows=rows,
            sources=len(settings.data.sources) or 1,
        )
        handles = _watch(layout.model, tally)
        stepper(batch, 1, 1.0, count=ids.numel())
        for handle in handles:
            handle.remove()
    return {name: dict(peak.by_kind) for name, peak in tally.peaks.items()}


@lru_cache(maxsize=16)  # the same for every micro-batch
def _trace_update(model: ModelConfig, optim: OptimConfig) -> int:
    """Give the bytes an update needs beside weights, state and gradients.

    It works on a limited number of elements at once: as many layers as reach it are enough.
    """
    block = 3 * model.width * model.mlp_hidden
    layers = min(model.layers, max(FEW_LAYERS, -(-STACK_ELEMENTS // block) + 1))
    with FakeTensorMode(), Tally("copies", "state") as tally:
        layout, optimizer = _lay_out(model, ParallelConfig(), optim, layers, tally)
        gradients = {name: torch.zeros_like(part.tensor) for name, part in layout.parts.items()}
        before = tally.now
        tally.enter("update")
        optimizer.step(gradients, torch.ones((), dtype=torch.bool))
        return tally.peaks["update"].bytes - before


def _lay_out(
    config: ModelConfig, parallel: ParallelConfig, optim: OptimConfig, layers: int, tally: Tally
) -> tuple[Layout, OptimizerSet]:
    """Make model and optimizer, and tell the tally what is what."""
    # not by `lay_out`, which begins on meta, from where fake tensors don't move
    model = Transformer(config.model_copy(update={"layers": layers}))
    model.positions.kernel = parallel.attention
    if parallel.attention == "flash":
        for block in model.blocks:
            cast(Block, block).attention.dropout = 0.0
    if parallel.recompute is not None:
        recompute_blocks(model.blocks, parallel.recompute)
    layout = Layout(model, ALONE)
    tally.turn_into((part.tensor for part in layout.parts.values()), "weights")
    tally.turn_into(layout.model.buffers(), "buffers")
    tally.kind = "optimizer"
    optimizer = build_optimizer(
        layout.parts, optim, layout.model.matrix_blocks(), layout.shard_group
    )
    return layout, optimizer


def _watch(model: nn.Module, tally: Tally) -> list[torch.utils.hooks.RemovableHandle]:
    """Have the tally follow a step: what is being made, and which stretch it is in.

    The backward pass has three stretches, for it may need most at its start, when everything that
    is kept lives, or at its end, when all gradients do: the head and the last block, the blocks
    between, the first block and the embedding.
    """
    blocks = list(getattr(model, "blocks"))  # noqa: B009
    left: dict[int, int] = {}  # parameters of each block whose gradient is still to come

    def forward_begins(*_: object) -> None:
        tally.kind = "activations"
        tally.enter("forward")

    def loss_begins(_: nn.Module, __: object, hidden: Tensor) -> None:
        tally.kind = "loss"
        tally.enter("loss")
        left.update({i: sum(1 for _ in block.parameters()) for i, block in enumerate(blocks)})
        left[ALL] = sum(1 for _ in model.parameters())
        if hidden.requires_grad:
            hidden.register_hook(backward_begins)

    def backward_begins(gradient: Tensor) -> None:
        tally.kind = "workspace"
        tally.enter("last block" if len(blocks) > 1 else "first block")

    def accumulated(index: int | None, parameter: Tensor) -> None:
        assert parameter.grad is not None
        tally.turn_into([parameter.grad], "gradients")
        left[ALL] -= 1
        if index is not None:
            left[index] -= 1
        if left[ALL] == 0:
            tally.enter("update")
        elif index and left[index] == 0:
            tally.enter("first block" if index == 1 else "middle blocks")

    handles = [
        model.register_forward_pre_hook(forward_begins),
        model.register_forward_hook(loss_begins),
    ]
    own = {id(p): i for i, block in enumerate(blocks) for p in block.parameters()}
    for parameter in model.parameters():
        hook = partial(accumulated, own.get(id(parameter)))
        handles.append(parameter.register_post_accumulate_grad_hook(hook))
    return handles
