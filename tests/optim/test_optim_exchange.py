"""Optimizers over rows: the same steps as over whole matrices, whoever works on a block."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from summerlm.core.parts import Part
from summerlm.optim import exchange, muon
from summerlm.optim.build import build_optimizer
from summerlm.optim.config import OptimConfig
from summerlm.optim.exchange import Block, deal

SHAPES = {  # some have fewer rows than there are ranks
    "embedding.weight": (41, 6),
    "blocks.0.attention_norm.weight": (3,),
    "blocks.0.attention.qkv.weight": (13, 7),
    "blocks.0.attention.output.weight": (3, 9),
    "blocks.0.mlp.gate_up.weight": (22, 7),
    "blocks.0.mlp.down.weight": (7, 11),
    "blocks.1.attention.qkv.weight": (13, 7),
    "blocks.1.mlp.down.weight": (7, 11),
}
BLOCKS = {
    "blocks.0.attention.qkv.weight": (8, 4, 1),
    "blocks.0.attention.output.weight": (3,),
    "blocks.0.mlp.gate_up.weight": (11, 11),
    "blocks.0.mlp.down.weight": (7,),
    "blocks.1.attention.qkv.weight": (8, 4, 1),
    "blocks.1.mlp.down.weight": (7,),
}
YES, NO = torch.tensor(True), torch.tensor(False)


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def rows_of(tensors, rank, world):
    """Rows as FSDP2 cuts them."""
    found = {}
    for name, tensor in tensors.items():
        size = -(-len(tensor) // world)
        start = min(rank * size, len(tensor))
        found[name] = Part(tensor[start : start + size].clone(), start, tuple(tensor.shape))
    return found


def steps(rank, world, group, dtype, limit):
    former, muon.STACK_ELEMENTS = muon.STACK_ELEMENTS, limit
    parts = rows_of(draw(0), rank, world)
    config = OptimConfig(name="muon", peak_lr=0.05, newton_schulz_dtype=dtype)
    optimizer = build_optimizer(parts, config, BLOCKS, group)
    muon.STACK_ELEMENTS = former
    norms = []
    for seed, ok in enumerate([YES, NO, YES, YES]):
        gradients = {n: p.tensor for n, p in rows_of(draw(seed + 1), rank, world).items()}
        norms.append(optimizer.step(gradients, ok).item())
    state = {**parts, **optimizer.parts()}
    return norms, {n: (p.start, p.shape, p.tensor) for n, p in state.items()}


def share(ranks, dtype, limit):
    return steps(ranks.rank, ranks.world, dist.group.WORLD, dtype, limit)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world", "dtype"),
    [pytest.param(2, "float32", marks=pytest.mark.slow), (3, "bfloat16"), (4, "float32")],
)
@pytest.mark.parametrize("limit", [60, 2**26], ids=["many-rounds", "one-round"])
def test_ranks_that_share_rows_step_as_one(world, dtype, limit):
    norms, whole = steps(0, 1, None, dtype, 2**26)
    results = run_ranks(share, dtype, limit, world=world)
    for rank, (rank_norms, state) in enumerate(results):
        assert rank_norms == results[0][0]
        assert rank_norms == pytest.approx(norms, rel=1e-2 if dtype == "bfloat16" else 1e-5)
        assert rank_norms[1] == 0
        for name, (start, shape, rows) in state.items():
            expected = whole[name][2]
            assert shape == tuple(expected.shape), (rank, name)
            if shape:
                expected = expected[start : start + len(rows)]
            # a bfloat16 iteration may round otherwise in a stack of another size
            tolerance = 4e-3 if dtype == "bfloat16" and name in BLOCKS else 1e-5
            torch.testing.assert_close(rows, expected, rtol=0, atol=tolerance)
    for name, shape in SHAPES.items():
        assert sum(len(state[name][2]) for _, state in results) == shape[0]


def travel(ranks):
    """How many elements one step sends, and in which dtype."""
    sent = []
    former = dist.all_to_all_single

    def record(output, message, *args, **kwargs):
        sent.append((message.dtype, message.numel()))
        return former(output, message, *args, **kwargs)

    exchange.dist.all_to_all_single = record
    steps(ranks.rank, ranks.world, dist.group.WORLD, "bfloat16", 2**26)
    return sent


@pytest.mark.ranks
def test_every_element_travels_there_and_back_in_the_dtype_of_the_iteration():
    elements = sum(rows * columns for n, (rows, columns) in matrices().items() if n in BLOCKS)
    sent = run_ranks(travel)
    assert {dtype for rank in sent for dtype, _ in rank} == {torch.bfloat16}
    per_step = [sum(rank[i][1] for rank in sent) for i in range(len(sent[0]))]
    assert sum(per_step) == 4 * 2 * elements  # four steps


def matrices():
    return {name: shape for name, shape in SHAPES.items() if len(shape) == 2}


def blocks_of(layers):
    shapes = {"q": (64, 64), "k": (16, 64), "v": (16, 64), "gate": (170, 64), "down": (64, 170)}
    return [Block(f"{i}.{n}", 0, *shape) for i in range(layers) for n, shape in shapes.items()]


def work(block):
    return min(block.shape) ** 2 * max(block.shape)


@pytest.mark.parametrize("owners", [1, 2, 3, 8])
def test_owners_work_about_as_long(owners):
    blocks = blocks_of(8)
    rounds = deal(blocks, owners, 2**26)
    shares = [[block for round_ in rounds for block in round_[o]] for o in range(owners)]
    assert sorted(block for share in shares for block in share) == sorted(blocks)
    loads = [sum(map(work, share)) for share in shares]
    assert max(loads) - min(loads) <= max(map(work, blocks))


def test_work_counts_and_not_size():
    """A square takes as long as many long strips of its size."""
    square, strips = Block("s", 0, 100, 100), [Block(f"{i}", 0, 2, 5000) for i in range(30)]
    ((one, other),) = deal([*strips, square], 2, 2**26)
    assert sorted([len(one), len(other)]) == [1, 30]


def test_rounds_are_bounded():
    rounds = deal(blocks_of(8), 3, 12_000)
    for round_ in rounds:
        for owned in round_:
            assert len(owned) <= 1 or sum(block.elements for block in owned) <= 12_000
    assert len(rounds) > 1
