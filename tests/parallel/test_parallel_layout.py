"""Layouts: who holds which rows, the first weights, what is kept and what is computed anew."""

import weakref

import pytest
import torch
from layouts import CPU, MODEL, batch_of, make, run_step
from models import build
from ranks import run_ranks
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from summerlm.core.errors import UsageError
from summerlm.core.ranks import ALONE, Ranks
from summerlm.model.config import ModelConfig
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.layout import lay_out


def held(ranks, shards):
    """The parts after a step at rate 0, which wraps and unwraps all: the first weights still."""
    stepper = make(ranks, {"shard_ranks": shards})
    layout = stepper.layout
    names = [name for name, _ in layout.model.named_parameters()]
    batch = batch_of(1)
    stepper(batch, 1, 0.0, count=100)
    layout.rest()
    storages = {p.data_ptr() for p in layout.model.parameters() if p.numel()}
    parts = {n: (p.start, p.stop, p.shape, p.tensor) for n, p in layout.parts.items()}
    plain = all(type(part.tensor) is torch.Tensor for part in layout.parts.values())
    return (layout.shard, layout.replica), names, parts, plain, len(storages)


@pytest.mark.ranks
@pytest.mark.parametrize(("world", "shards"), [(2, 1), (2, "all"), (3, 3), (4, 2)])
def test_first_weights_are_the_same_to_the_bit_in_every_layout(world, shards):
    model = build(ModelConfig(**MODEL), seed=1)
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
    count = world if shards == "all" else shards
    rows = dict.fromkeys(whole, 0)
    for rank, (place, names, parts, plain, _) in enumerate(run_ranks(held, shards, world=world)):
        assert place == (rank % count, rank // count)
        assert names == list(whole)
        assert plain
        for name, (start, stop, shape, tensor) in parts.items():
            assert shape == whole[name].shape
            assert torch.equal(tensor, whole[name][start:stop]), name
            rows[name] += stop - start
    copies = world // count
    assert rows == {name: copies * len(tensor) for name, tensor in whole.items()}


def test_shards_must_divide_the_ranks():
    for shards, world in [(2, 3), (2, 1), (8, 4)]:
        parallel = ParallelConfig(shard_ranks=shards)
        with pytest.raises(UsageError, match=rf"shard_ranks \({shards}\).*ranks \({world}\)"):
            lay_out(
                ModelConfig(**MODEL), parallel, Ranks(world=world), seed=0, device=CPU, dtype=None
            )


def test_a_rank_alone_has_nothing_round_its_model():
    stepper = make(parallel={"shard_ranks": "all"})
    model = stepper.layout.model
    assert stepper.layout.shard_group is None
    assert type(model).__name__ == "Transformer"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, parameter in model.named_parameters():
        assert stepper.layout.parts[name].tensor.data_ptr() == parameter.data_ptr()


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are still alive."""

    def __init__(self):
        super().__init__()
        self._storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return made

    def bytes(self):
        return sum(size for storage, size in self._storages.values() if storage() is not None)


def kept_bytes(recompute, dtype=None):
    """Bytes that a forward pass keeps for the backward pass; and the gradients."""
    stepper = make(parallel={"recompute": recompute}, model={"dropout": 0.2, "layers": 4})
    layout, batch = stepper.layout, batch_of(1)
    torch.manual_seed(0)
    with Alive() as alive, torch.autocast("cpu", dtype, enabled=dtype is not None):
        hidden = layout(batch.tokens, batch.documents)
        size = alive.bytes()
    hidden.square().sum().backward()
    named = layout.model.named_parameters()
    return size, {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_recomputation_keeps_less_and_gives_the_same_gradients(dtype):
    everything, expected = kept_bytes(None, dtype)
    selective, some = kept_bytes("selective", dtype)
    full, none = kept_bytes("full", dtype)
    assert full < 0.5 * selective < 0.4 * everything
    for gradients in (some, none):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[name]), name


def count_products(recompute):
    """How often a step multiplies matrices."""
    counts = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[str(function)] = counts.get(str(function), 0) + 1
            return function(*args, **(kwargs or {}))

    stepper = make(parallel={"recompute": recompute, "attention": "sdpa"})
    with Count():
        run_step(stepper, 1)
    names = ("aten.mm.default", "aten.addmm.default")
    kernels = [n for n in counts if "scaled_dot_product" in n and "backward" not in n]
    return sum(counts.get(n, 0) for n in names), sum(counts[n] for n in kernels)


def test_selective_computes_no_product_anew_and_full_computes_each():
    plain, selective, full = map(count_products, (None, "selective", "full"))
    assert selective == plain
    assert full == (plain[0] + 2 * 3, plain[1] + 2)  # of each of 2 blocks; the last isn't needed


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, "selective"])
def test_all_blocks_share_one_compiled_graph(recompute):
    torch._dynamo.reset()
    counters.clear()
    stepper = make(parallel={"compile": True, "recompute": recompute}, model={"layers": 12})
    run_step(stepper, 1)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # of all blocks, and of the loss
    assert not counters["frames"]["total"] - counters["frames"]["ok"]


def lossy(ranks, shards, parallel):
    """A step in bfloat16."""
    stepper = make(ranks, {"shard_ranks": shards, **parallel}, dtype=torch.bfloat16)
    hidden = []
    stepper.layout.model.final_norm.register_forward_hook(lambda m, i, o: hidden.append(i[0].dtype))
    losses = [run_step(stepper, n).loss.item() for n in range(1, 4)]
    grads = {part.tensor.dtype for part in stepper.layout.parts.values()}
    grads |= {gradient.dtype for gradient in stepper.layout.gradients().values()}
    return losses, set(hidden), grads


@pytest.mark.ranks
@pytest.mark.parametrize("shards", [1, "all"])
def test_bfloat16_leaves_the_residual_stream_weights_and_gradients_in_float32(shards):
    expected, _, _ = lossy(ALONE, 1, {})
    for losses, stream, weights in run_ranks(lossy, shards, {"micro_batch_rows": 2}):
        assert losses == pytest.approx(expected, rel=5e-3)
        assert stream == {torch.float32}
        assert weights == {torch.float32}
