"""Profiles: what `run.profile` writes, that it changes no bit, and tables that sum to the step."""

import gzip
import json
import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import make, run_step
from ranks import run_ranks
from rich.console import Console

from summerlm.core.config import read_settings
from summerlm.core.marks import part
from summerlm.core.ranks import ALONE
from summerlm.core.record import read_rows
from summerlm.recipes import profiling
from summerlm.recipes.breakdown import (
    ATTENTION,
    BLOCK,
    BLOCK_KERNEL,
    KERNEL,
    OF_THE_MODEL,
    OTHER,
    PRODUCTS,
    STEP,
    Interval,
    break_down,
    nest,
    settle_places,
    share_out,
)
from summerlm.recipes.pretrain import pretrain
from summerlm.recipes.settings import Settings


@pytest.fixture
def start(tiny_config, tmp_path):
    """Train with overrides into a named folder; gives the folder."""

    def run(folder, *overrides):
        path = tmp_path / folder
        settings = read_settings(Settings, tiny_config, [f"run.folder={path}", *overrides])
        assert pretrain(settings, Console(quiet=True)) == 0
        return path

    return run


def learning(folder):
    """What each step came to, to the bit."""
    keys = ("step", "loss", "grad_norm", "update_norm", "batch_sha", "lr")
    rows = read_rows(folder / "metrics.jsonl")
    return [tuple(row[key] for key in keys) for row in rows if row["kind"] == "train"]


def files_of(folder):
    return sorted(path.name for path in (folder / "profile").iterdir())


def seconds_by_part(found):
    return {row["part"]: row["seconds"] for row in found["parts"]}


# a run's profile


def test_a_profile_changes_no_bit_and_says_where_time_went(start):
    plain, folder = start("plain"), start("profiled", "run.profile=true")
    assert learning(plain) == learning(folder)
    assert not (plain / "profile").exists()
    # 12 steps in all: the last five
    assert files_of(folder) == [f"steps-8-12.{end}" for end in ("json", "trace.json.gz", "txt")]
    found = json.loads((folder / "profile" / "steps-8-12.json").read_text())
    assert found["steps"] == 5
    assert {*OF_THE_MODEL, "data", "optimizer: AdamW", "optimizer: Muon", "hooks"} - {
        PRODUCTS,
        BLOCK_KERNEL,
    } <= seconds_by_part(found).keys()
    assert all(row["seconds"] > 0 for row in found["parts"])
    text = (folder / "profile" / "steps-8-12.txt").read_text()
    assert all(row["part"] in text for row in found["parts"])
    assert "100.0 %" in text
    with gzip.open(folder / "profile" / "steps-8-12.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    measured = [event["dur"] for event in events if event["name"] == STEP and event["ph"] == "X"]
    assert len(measured) == 5
    assert found["seconds"] == pytest.approx(sum(measured) / 5e6, rel=1e-6)
    assert sum(seconds_by_part(found).values()) == pytest.approx(found["seconds"], rel=1e-6)
    assert sum(row["share"] for row in found["parts"]) == pytest.approx(1)
    (row,) = (r for r in read_rows(folder / "metrics.jsonl") if r["kind"] == "profile")
    assert (row["step"], row["seconds"]) == (12, found["seconds"])
    assert row["trace"].endswith("steps-8-12.trace.json.gz")


@pytest.mark.parametrize(
    ("steps", "name"), [(3, "1-3"), (20, "10-14")], ids=["fewer than five", "enough"]
)
def test_which_steps_are_profiled(start, steps, name):
    folder = start("a", "run.profile=true", f"train.budget_tokens={steps * 256}")
    assert files_of(folder)[0] == f"steps-{name}.json"
    assert len(learning(folder)) == steps


def test_each_start_has_a_profile_of_its_own(start, monkeypatch):
    """A run that is stopped and goes on; the first start is stopped after its profile."""
    whole = start("whole")

    def stopping(steps, run, recorder):
        for event in profiling.profiled_run(steps, run, recorder):
            if event.step == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            yield event

    monkeypatch.setattr(profiling, "WARM_UP", 1)
    monkeypatch.setattr(profiling, "STEPS", 2)
    monkeypatch.setattr("summerlm.recipes.pretrain.profiled_run", stopping)
    start("a", "run.profile=true")
    monkeypatch.setattr("summerlm.recipes.pretrain.profiled_run", profiling.profiled_run)
    folder = start("a", "run.profile=true")
    assert learning(folder) == learning(whole)
    tables = [name for name in files_of(folder) if name.endswith(".txt")]
    assert len(tables) == 2
    assert tables[1] == "steps-2-3.txt"
    before = files_of(folder)
    assert start("a", "run.profile=true") == folder  # finished: left as it is
    assert files_of(folder) == before


def test_a_disk_that_refuses_a_profile_ends_no_run(start, monkeypatch):
    replace = os.replace

    def full(source, target):
        if str(target).endswith(".trace.json.gz"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    folder = start("a", "run.profile=true")
    assert len(learning(folder)) == 12
    reasons = [row["reason"] for row in read_rows(folder / "incidents.jsonl")]
    assert len(reasons) == 1
    assert "no profile could be written" in reasons[0]


# marks and the table


def hooks_of(model):
    modules = model.modules()
    return [len(hooks) for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def parts_of_a_step(tmp_path, work=None, compiled=False, ranks=ALONE, **parallel):
    """Steps of the small model under the profiler; gives the table."""
    stepper = make(ranks, parallel={"compile": compiled, **parallel}, optim={"name": "muon"})
    run_step(stepper, 1)
    model = stepper.layout.model
    hooks = hooks_of(model)

    def steps():
        for number in range(2, 5):
            run_step(stepper, number)
            if work is not None:
                work(model)
            yield number

    trace = tmp_path / "trace.json.gz"
    device = torch.device("cpu")
    assert list(profiling.record_steps(steps(), 2, model, device, compiled, trace)) == [2, 3]
    assert hooks_of(model) == hooks  # marks are gone with the profile
    return break_down(trace)


def rows_of(found):
    return {row["part"]: row for row in found["parts"]}


def test_every_part_goes_forward_and_backward(tmp_path):
    rows = rows_of(parts_of_a_step(tmp_path))
    model = set(OF_THE_MODEL) - {PRODUCTS, BLOCK_KERNEL}
    assert model <= rows.keys()
    for name in model:
        row = rows[name]
        assert row["forward"] > 0, name
        assert row["backward"] > 0, name
        assert row["recomputed"] == 0, name
        assert row["seconds"] == row["forward"] + row["backward"]
    assert rows["gradients: kept"]["seconds"] > 0
    assert PRODUCTS not in rows


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_anew_has_a_column(tmp_path, recompute):
    rows = rows_of(parts_of_a_step(tmp_path, recompute=recompute))
    anew = {name for name, row in rows.items() if row.get("recomputed")}
    assert {"attention: norm", "MLP: norm", "MLP: activation", ATTENTION} <= anew
    assert not anew & {"embedding", "final norm", "head and loss", "data", "optimizer: Muon"}
    assert (rows["attention: qkv"]["recomputed"] > 0) is (recompute == "full" or True)
    assert rows["MLP: down"]["backward"] > 0


def on_ranks(ranks, folder, shards):
    own = folder / str(ranks.rank)
    own.mkdir()
    return parts_of_a_step(own, ranks=ranks, shard_ranks=shards)


@pytest.mark.ranks
@pytest.mark.parametrize("shards", [1, "all"])
def test_what_ranks_send_is_a_part_by_itself(tmp_path, shards):
    for found in run_ranks(on_ranks, tmp_path, shards):
        rows = rows_of(found)
        assert set(OF_THE_MODEL) - {PRODUCTS, BLOCK_KERNEL} <= rows.keys()
        assert rows["between ranks"]["seconds"] > 0


@pytest.mark.slow
def test_compiled_blocks_are_told_apart_by_their_operations(tmp_path):
    torch._dynamo.reset()
    rows = rows_of(parts_of_a_step(tmp_path, compiled=True))
    assert {PRODUCTS, BLOCK_KERNEL, BLOCK, "embedding", "head and loss"} <= rows.keys()
    assert not {"attention: qkv", KERNEL, "MLP: down"} & rows.keys()
    for name in (PRODUCTS, BLOCK_KERNEL, BLOCK):
        assert rows[name]["forward"] > 0, name
        assert rows[name]["backward"] > 0, name


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_blocks_have_no_marks_inside(compiled):
    """They would be compiled into it, the next time that something is."""
    model = make().layout.model
    with profiling.marked(model, compiled):
        for block in model.blocks:
            assert block._forward_hooks
            inside = [m for m in block.modules() if m is not block and m._forward_hooks]
            assert bool(inside) is not compiled


ODD = {  # where something odd is done, and the part that it belongs to
    "attention.qkv": "attention: qkv",
    "attention.output": "attention: output",
    "attention.key_norm": ATTENTION,
    "mlp.gate_up": "MLP: gate, up",
    "mlp.down": "MLP: down",
    "mlp_norm": "MLP: norm",
}


class Odd(torch.autograd.Function):
    """Leaves values as they are; does what nothing else does, forward or backward."""

    @staticmethod
    def forward(ctx, x, phase):
        ctx.phase = phase
        return x.clone() + (0 * x.atan() if phase == "forward" else 0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient + (0 * gradient.atan() if ctx.phase == "backward" else 0), None


def places_of(trace, name):
    """The places of all operations of a name."""
    raw = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    events = nest([event for event in raw if event.get("ph") == "X"])
    settle_places(events)
    return {event.place for event in events if event.name == name}


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("name", ODD)
def test_each_operation_is_where_the_table_says(tmp_path, monkeypatch, name, phase):
    stepper_of = make

    def changed(*ranks, **settings):
        stepper = stepper_of(*ranks, **settings)
        module = stepper.layout.model.blocks[0].get_submodule(name)
        inner = module.forward
        module.forward = lambda x: Odd.apply(inner(x), phase)
        return stepper

    monkeypatch.setitem(globals(), "make", changed)
    parts_of_a_step(tmp_path)
    assert places_of(tmp_path / "trace.json.gz", "aten::atan") == {(ODD[name], phase)}


def test_marks_of_the_step_get_what_is_inside(tmp_path):
    def work(model):
        with part("data"):
            torch.ones(()).atan()

    parts_of_a_step(tmp_path, work)
    assert places_of(tmp_path / "trace.json.gz", "aten::atan") == {("data", "forward")}


# sharing out


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(0, 5), st.integers(0, 3)),
        max_size=12,
    ),
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 8)), max_size=3),
)
def test_each_moment_goes_to_the_highest_rank(found, gaps):
    intervals = [
        Interval(a, a + n, r + i / 100, (str(p), "forward")) for i, (a, n, r, p) in enumerate(found)
    ]
    windows, now = [], 0
    for gap, length in gaps:
        windows.append((now + gap, now + gap + length))
        now += gap + length
    expected = {}
    for start, stop in windows:
        for moment in range(start, stop):
            alive = [i for i in intervals if i.start <= moment < i.stop]
            place = max(alive, key=lambda i: i.rank).place if alive else (OTHER, "forward")
            expected[place] = expected.get(place, 0) + 1
    assert share_out(intervals, windows) == expected


# a GPU's trace, written by hand: this machine has none


def event(category, name, start, length, thread=1, **arguments):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": length,
        "tid": thread,
        "args": arguments,
    }


def test_a_gpu_s_time_goes_to_what_launched_its_work(tmp_path):
    host, mark, kernel = "cpu_op", "user_annotation", "kernel"
    engine = "autograd::engine::evaluate_function: "
    events = [
        event(mark, STEP, 0, 1000),
        event(mark, "part: attention: qkv", 10, 20),
        event(host, "aten::mm", 12, 10, **{"External id": 1, "Sequence number": 7}),
        event(mark, f"part: {ATTENTION}", 40, 60),
        event(host, "aten::cat", 42, 4, **{"External id": 2, "Sequence number": 8}),
        event(host, "aten::scaled_dot_product_attention", 50, 10, **{"Sequence number": 9}),
        event(host, "aten::_flash_attention_forward", 52, 5, **{"External id": 3}),
        event(host, "aten::transpose", 70, 5, **{"External id": 4, "Sequence number": 10}),
        # another thread goes backward
        event(host, engine + "CatBackward0", 120, 10, 2, **{"Sequence number": 8}),
        event(host, "aten::slice", 122, 2, 2, **{"External id": 5, "Sequence number": 7}),
        event(host, engine + "MmBackward0", 140, 10, 2, **{"Sequence number": 7}),
        event(host, "aten::mm", 142, 2, 2, **{"External id": 6}),
        event(host, engine + "torch::autograd::AccumulateGrad", 150, 10, 2),
        event(host, "c10d::allreduce_", 152, 2, 2, **{"External id": 7}),
        event(mark, "part: data", 600, 400),
        # the device, later than the host
        event(kernel, "gemm", 100, 200, 70, **{"External id": 1}),
        event(kernel, "cat", 300, 50, 70, **{"External id": 2}),
        event(kernel, "flash", 350, 100, 70, **{"External id": 3}),
        event(kernel, "slice", 450, 50, 70, **{"External id": 5}),
        event(kernel, "gemm", 520, 100, 70, **{"External id": 6}),
        event(kernel, "ncclDevKernel_AllReduce", 500, 160, 71, **{"External id": 7}),
        event(kernel, "transpose", 700, 20, 70, **{"External id": 4}),
        event("gpu_memcpy", "Memcpy", 2000, 100, 70, **{"External id": 4}),  # after the steps
        {"ph": "i", "name": "nothing"},
    ]
    trace = tmp_path / "trace.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = break_down(trace)
    micro = {
        row["part"]: {
            key: round(value * 1e6) for key, value in row.items() if key not in ("part", "share")
        }
        for row in found["parts"]
    }
    model = {"recomputed": 0}
    assert micro == {
        "attention: qkv": {**model, "forward": 200, "backward": 100, "seconds": 300},
        ATTENTION: {**model, "forward": 70, "backward": 50, "seconds": 120},
        KERNEL: {**model, "forward": 100, "backward": 0, "seconds": 100},
        # what overlaps with products costs nothing: 500-520 and 620-660 are left
        "between ranks": {"seconds": 60},
        "data": {"seconds": 320},
        OTHER: {"seconds": 100},
    }
    assert found["seconds"] == pytest.approx(1e-3)
