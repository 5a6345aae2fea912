"""Layouts: how one model lies over the ranks of a job, and how their gradients become one.

Flow: `lay_out`
    1. builds the model without memory, and decides its attention kernel;
    2. wraps its blocks: fp8 products, recomputation, compilation, and sharding outermost;
    3. gives it memory and its first weights, the same in every layout;
    4. wraps it whole where each rank has a copy of its own.
`train.step` runs and differentiates a `Layout`, `optim` steps its parts, `checkpoint` saves them.
With S ranks to a copy, rank r holds shard r % S of copy r // S: neighbours share one.

Shapes: B rows, T positions, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from summerlm.core.parts import Part
from summerlm.core.ranks import Ranks
from summerlm.core.runtime import keep_freed_memory
from summerlm.model.config import ModelConfig
from summerlm.model.init import fill
from summerlm.model.kernels import install
from summerlm.model.transformer import Transformer
from summerlm.parallel.attention import choose_kernel
from summerlm.parallel.compile import compile_blocks
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.float8 import check_float8, convert_blocks
from summerlm.parallel.recompute import recompute_blocks
from summerlm.parallel.sharding import parts_of, shard


class Layout:
    """A model as one rank sees it; this one is a rank alone, with nothing round the model.

    Args:
        model: The model, with its memory.
        ranks: The job.
        shards: Ranks that share one copy of the model.
        shard_group: The process group of those that share this rank's; None for a whole copy.
    """

    compiled = False
    """Whether blocks are compiled; the loss is then, too."""

    settles = False
    """Whether the first pass that reduces decides the order of later sums."""

    def __init__(
        self,
        model: Transformer,
        ranks: Ranks,
        shards: int = 1,
        shard_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.shards, self.replicas = shards, ranks.world // shards
        self.shard, self.replica = ranks.rank % shards, ranks.rank // shards
        self.shard_group = shard_group
        self.parts: dict[str, Part] = parts_of(model, self.shard, shards)

    def __call__(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Run the model for training.

        Args:
            tokens: Ids, (B, T), int64.
            documents: Document of each token in its row, (B, T), int64.

        Returns:
            Hidden states, (B, T, D); `model.head_weight` may be used with them.
        """
        hidden: Tensor = self.model(tokens, documents)
        return hidden

    @contextmanager
    def reducing(self, now: bool) -> Iterator[None]:
        """Add up gradients over ranks in this forward and backward pass, or keep them until later.

        Args:
            now: Whether this is the step's last pass.

        Yields:
            Nothing; the body of the `with` runs one pass forward and backward.
        """
        yield

    def gradients(self) -> dict[str, Tensor]:
        """Give the gradients of this rank's parts, summed over ranks, by parameter; live."""
        found = {}
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            grad = parameter.grad
            found[name] = grad.to_local() if isinstance(grad, DTensor) else grad
        return found

    def rest(self) -> None:
        """Forget what the ranks have lent each other, as after an evaluation."""


class Replicated(Layout):
    """Each rank has a whole copy.

    Args:
        model: The model, with its memory and weights.
        ranks: The job.
    """

    settles = True

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        tables = [name for name, _ in model.named_buffers()]  # constants: nothing to broadcast
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, tables)
        self._copies = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._copies.register_comm_hook(None, _sum_bucket)

    def __call__(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Run the model; see `Layout`."""
        hidden: Tensor = self._copies(tokens, documents)
        return hidden

    @contextmanager
    def reducing(self, now: bool) -> Iterator[None]:
        """Reduce in this pass or later; see `Layout`."""
        if now:
            yield
        else:
            with self._copies.no_sync():
                yield


class Sharded(Layout):
    """Several ranks share a copy; there may be several copies.

    Args:
        model: The model, sharded over `mesh`, with its memory.
        ranks: The job.
        mesh: The ranks: shards, or replicas by shards.
    """

    def __init__(self, model: Transformer, ranks: Ranks, mesh: DeviceMesh) -> None:
        super().__init__(model, ranks, mesh.size(-1), mesh.get_group(mesh.ndim - 1))

    @contextmanager
    def reducing(self, now: bool) -> Iterator[None]:
        """Reduce in this pass or later; see `Layout`."""
        cast(FSDPModule, self.model).set_requires_gradient_sync(now)
        yield

    def rest(self) -> None:
        """Keep the own rows alone; see `Layout`."""
        cast(FSDPModule, self.model).reshard()


def lay_out(
    config: ModelConfig,
    parallel: ParallelConfig,
    ranks: Ranks,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Layout:
    """Make a model with its first weights, spread over the ranks of a job.

    Args:
        config: The model's settings.
        parallel: How it is spread and executed.
        ranks: The job; every rank calls this at the same place.
        seed: Seed of the weights: the same ones in every layout, to the bit.
        device: Where this rank's part lives.
        dtype: Autocast's dtype, or None for float32.

    Returns:
        The layout, its model in training mode.

    Raises:
        UsageError: If the ranks can't be dealt so, or fp8 or an attention kernel is asked for
            where it can't be.
    """
    shards = parallel.shards(ranks.world)
    if device.type == "cpu":
        keep_freed_memory()
    if parallel.float8:
        check_float8(config, device, dtype)
    with torch.device("meta"):
        model = Transformer(config)
    model.positions.kernel = ranks.lead(
        lambda: choose_kernel(parallel.attention, config, device, dtype)
    )
    install(model.positions.kernel)
    if parallel.float8:
        convert_blocks(model.blocks)
    if parallel.recompute is not None:
        recompute_blocks(model.blocks, parallel.recompute)
    if parallel.compile:
        compile_blocks(model.blocks, device)
    mesh = None
    if shards > 1:
        mesh = _mesh(device, ranks, shards)
        shard(model, mesh, dtype)
    model.to_empty(device=device)
    layout = Layout(model, ranks) if mesh is None else Sharded(model, ranks, mesh)
    fill(layout.parts, config, seed)
    if ranks.world > 1 and shards == 1:
        layout = Replicated(model, ranks)
    layout.compiled = parallel.compile
    return layout


def _mesh(device: torch.device, ranks: Ranks, shards: int) -> DeviceMesh:
    if shards == ranks.world:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    table = torch.arange(ranks.world).view(-1, shards)  # (replicas, shards)
    # the mesh would make groups of its own with NCCL's timeout, which is shorter than ours
    groups = [
        dist.new_subgroups_by_enumeration(lists.tolist(), timeout=ranks.timeout)[0]
        for lists in (table.T, table)
    ]
    names = ("replica", "shard")
    return DeviceMesh.from_group(groups, device.type, mesh=table, mesh_dim_names=names)


def _sum_bucket(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Add gradients up; without a hook they would become means over ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
