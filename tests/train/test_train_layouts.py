"""What is trained doesn't depend on how the model lies over ranks, nor on micro-batches."""

import gc
import itertools

import pytest
import torch
from layouts import ADAMW, MUON, ROWS, batch_of, digest, live, make, rows_of, run_step
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile

from summerlm.core.ranks import ALONE
from summerlm.data.batch import IGNORE
from summerlm.train.step import Limits

pytestmark = pytest.mark.ranks

STEPS = 20
TIED = {"tied_embeddings": True}
LAYOUTS = {2: (1, "all"), 4: (1, 2, "all")}


def train(ranks, parallel, optim, model):
    """Losses of 20 steps and of a validation; and a hash of the weights."""
    stepper = make(ranks, parallel, optim, model)
    losses = [run_step(stepper, n).loss.item() for n in range(1, STEPS + 1)]
    return [*losses, validate(stepper)], digest(stepper)


def validate(stepper):
    """Mean loss of rows that are not trained on, as an evaluation measures it, on every rank."""
    model, batch = stepper.layout.model.eval(), batch_of(99)
    with torch.inference_mode():
        logits = model.logits(model(batch.tokens, batch.documents))
    stepper.layout.rest()
    model.train()
    loss = torch.nn.functional.cross_entropy
    return loss(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE).item()


def train_all(ranks, cases):
    return [train(ranks, *case) for case in cases]


def check(world, cases):
    results = run_ranks(train_all, cases, world=world)
    for index, (parallel, optim, model) in enumerate(cases):
        expected, _ = train(ALONE, {}, optim, model)
        losses = [result[index][0] for result in results]
        assert all(other == losses[0] for other in losses), "ranks disagree"
        largest = max(abs(a - b) for a, b in zip(losses[0], expected, strict=True))
        assert largest < 1e-5, (parallel, optim, model, largest)


@pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])
def test_micro_batches_change_nothing(optim):
    expected, _ = train(ALONE, {}, optim, {})
    for rows in (1, 5, ROWS, 50):
        losses, _ = train(ALONE, {"micro_batch_rows": rows}, optim, {})
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_layout_changes_nothing(world):
    """One case for each layout; the slow twin of this test crosses them with all else."""
    micros, optims, models = (2, None, 1), (MUON, ADAMW, MUON), (TIED, {}, {})
    check(
        world,
        [
            ({"shard_ranks": shards, "micro_batch_rows": micro}, optim, model)
            for shards, micro, optim, model in zip(
                LAYOUTS[world], micros, optims, models, strict=False
            )
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])
def test_no_layout_changes_anything(world, optim):
    heads = itertools.cycle([TIED, {}])  # an odd number of micro-batches: each layout meets both
    cases = itertools.product(LAYOUTS[world], (1, 3, None))
    check(
        world,
        [
            ({"shard_ranks": shards, "micro_batch_rows": micro}, optim, next(heads))
            for shards, micro in cases
        ],
    )


def train_twice(ranks, parallel, optim, model):
    """Six steps at once, and three, a new process's start in between, and three."""
    whole = make(ranks, parallel, optim, model)
    results = [run_step(whole, n).loss.item() for n in range(1, 7)]
    first = make(ranks, parallel, optim, model)
    again = [run_step(first, n).loss.item() for n in range(1, 4)]
    second = make(ranks, parallel, optim, model)
    for name, tensor in live(second).items():
        tensor.copy_(live(first)[name])
    again += [run_step(second, n).loss.item() for n in range(4, 7)]
    return results == again, digest(whole), digest(second)


def same_bits(ranks, cases):
    return [train_twice(ranks, *case) for case in cases]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_layout_gives_the_same_bits_twice_and_over_a_restart(world):
    """Replicas decide the order of their sums in a first pass: a restart must not be without it."""
    optim = {"name": "muon", "peak_lr": 0.01}  # bfloat16 shows any change at once
    cases = [({"shard_ranks": s, "micro_batch_rows": 4}, optim, {}) for s in LAYOUTS[world]]
    runs = [run_ranks(same_bits, cases, world=world) for _ in range(2)]
    assert runs[0] == runs[1]
    for result in runs[0]:
        for same, whole, resumed in result:
            assert same
            assert whole == resumed


def go_back(ranks, shards):
    """A step, with weights filled anew after an evaluation, as a checkpoint fills them."""
    first = make(ranks, {"shard_ranks": shards})
    former = {name: tensor.clone() for name, tensor in live(first).items()}
    once = run_step(first, 1).loss.item()
    model, batch = first.layout.model, batch_of(99)
    with torch.no_grad():
        model(batch.tokens, batch.documents)  # and whoever evaluates forgets to let it rest
    for name, tensor in live(first).items():
        tensor.copy_(former[name])
    return run_step(first, 1).loss.item() == once


@pytest.mark.parametrize("shards", [1, "all"])
def test_no_rank_keeps_old_weights(shards):
    assert run_ranks(go_back, shards) == [True, True]


def poison(ranks, shards, where, value):
    """A step where one rank's loss or gradient is not finite, between two that are."""
    stepper = make(ranks, {"shard_ranks": shards}, MUON)
    fine = [bool(run_step(stepper, 1).ok)]
    before = digest(stepper)
    if ranks.rank == 1 and where == "loss":
        handle = stepper.layout.model.final_norm.register_forward_hook(lambda *a: a[-1] * value)
    elif ranks.rank == 1:

        def spoil(_, inputs, output):
            output.register_hook(lambda grad: grad.index_fill(1, torch.tensor([3]), value))

        handle = stepper.layout.model.blocks[0].mlp.down.register_forward_hook(spoil)
    result = run_step(stepper, 2)
    fine += [bool(result.ok), digest(stepper) == before, result.update_norm.item() == 0]
    if ranks.rank == 1:
        handle.remove()
    fine.append(bool(run_step(stepper, 3).ok))
    return [*fine, digest(stepper) != before]


@pytest.mark.parametrize("shards", [1, "all"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_changes_no_bit_on_any(shards, where):
    value = float("nan") if where == "loss" else float("inf")
    expected = [True, False, True, True, True, True]
    assert run_ranks(poison, shards, where, value) == [expected] * 2


def limited(ranks):
    stepper = make(ranks)
    free = run_step(stepper, 1)
    loss, norm = free.loss.item(), free.grad_norm.item()
    before = digest(stepper)
    tight = [Limits(loss=loss / 2), Limits(norm=norm / 2), Limits(0, 0)]
    assert not any(run_step(stepper, 2, limits=limits).ok for limits in tight)
    assert digest(stepper) == before
    assert run_step(stepper, 2, limits=Limits(2 * loss, 2 * norm)).ok
    return digest(stepper) != before


def test_a_step_beyond_its_limits_is_not_made():
    assert limited(ALONE)
    assert run_ranks(limited) == [True, True]


def report(ranks, shards):
    result = run_step(make(ranks, {"shard_ranks": shards, "micro_batch_rows": 2}), 1)
    values = (result.source_nats, result.source_targets, result.grad_norm, result.update_norm)
    own = (result.row_nats, result.row_targets)
    return [value.tolist() for value in values], [value.tolist() for value in own], result.own_s


def test_a_step_reports_sums_over_all_ranks_and_its_own_rows():
    (nats, targets, norm, moved), (row_nats, row_targets), _ = report(ALONE, 1)
    batch = batch_of(1)
    assert row_targets == (batch.targets != IGNORE).sum(1).tolist()
    assert sum(row_nats) == pytest.approx(sum(nats))
    for world, shards in [(2, 1), (4, 2), (4, "all")]:
        for rank, (sums, own, own_s) in enumerate(run_ranks(report, shards, world=world)):
            assert sums[0] == pytest.approx(nats, rel=1e-5)
            assert sums[1] == targets
            assert sums[2] == pytest.approx(norm, rel=1e-5)
            assert sums[3] == pytest.approx(moved, rel=1e-3)
            assert own[0] == pytest.approx(row_nats[rank::world], rel=1e-4)
            assert own[1] == row_targets[rank::world]
            assert 0 < own_s < 60


def measure_bytes(ranks, shards):
    """Bytes of everything alive after a step, but for gradients."""
    sizes = {"width": 128, "mlp_hidden": 256}
    stepper = make(ranks, {"shard_ranks": shards}, MUON, sizes)
    run_step(stepper, 1)
    validate(stepper)
    stepper.layout.model.zero_grad()
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and type(t) is not torch.distributed.tensor.DTensor
    }
    held = {**stepper.layout.parts, **stepper.optimizer.parts()}
    return sum(part.tensor.untyped_storage().nbytes() for part in held.values()), storages


def test_two_ranks_halve_the_bytes_of_weights_and_optimizer():
    (whole, alive), *_ = run_ranks(measure_bytes, 1)
    for half, alive_half in run_ranks(measure_bytes, "all"):
        assert half < 0.51 * whole
        assert sum(alive_half.values()) < 0.55 * sum(alive.values())  # nor is a copy hidden


def count_messages(ranks, shards, micro_rows):
    stepper = make(ranks, {"shard_ranks": shards, "micro_batch_rows": micro_rows})
    run_step(stepper, 1)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run_step(stepper, 2)
    names = [event.name for event in seen.events() if event.name.startswith("gloo:")]
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.mark.parametrize("shards", [1, "all"])
def test_gradients_are_reduced_once_a_step(shards):
    """However many micro-batches: only weights travel more often."""
    one, many = (run_ranks(count_messages, shards, rows)[0] for rows in (None, 1))
    gathers = [name for name in one if "gather" in name]
    assert {n: c for n, c in one.items() if n not in gathers} == {
        n: c for n, c in many.items() if n not in gathers
    }
    assert sum(one.values()) > 1
    # with 2 blocks: all on the way forward, the blocks anew on the way back, for each of 6 rows
    assert sum(one[n] for n in gathers) == (0 if shards == 1 else 5)
    assert sum(many[n] for n in gathers) == (0 if shards == 1 else 5 * 6)


def mask_rows(ranks):
    """The same row on every rank, under dropout."""
    stepper = make(ranks, model={"dropout": 0.5})
    batch = batch_of(1)
    alike = rows_of(batch, ALONE).split(1)[1]
    return stepper(alike, 1, 1.0, count=24).row_nats.item()


def test_ranks_drop_different_channels():
    one, two = run_ranks(mask_rows)
    assert one != two
    assert [one, two] == run_ranks(mask_rows)


def train_compiled(ranks, parallel):
    stepper = make(ranks, {**parallel, "compile": True}, MUON)
    return [run_step(stepper, n).loss.item() for n in range(1, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shards", "recompute"), [(1, None), (1, "full"), ("all", None), ("all", "selective")]
)
def test_compiled_blocks_train_alike(shards, recompute):
    expected = [
        run_step(stepper, n).loss.item() for stepper in [make(optim=MUON)] for n in (1, 2, 3)
    ]
    parallel = {"shard_ranks": shards, "recompute": recompute, "micro_batch_rows": 3}
    for losses in run_ranks(train_compiled, parallel):
        assert losses == pytest.approx(expected, abs=1e-5)
