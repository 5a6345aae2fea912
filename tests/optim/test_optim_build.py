import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from summerlm.optim.build import build_optimizer
from summerlm.optim.config import OptimConfig

SHAPES = {
    "embedding.weight": (40, 8),
    "blocks.0.attention_norm.weight": (8,),
    "blocks.0.attention.qkv.weight": (16, 8),
    "blocks.0.mlp.gate_up.weight": (40, 8),
    "blocks.0.mlp.gate_up.bias": (40,),
    "blocks.0.mlp.down.weight": (8, 20),
    "head.weight": (40, 8),
}
BLOCKS = {
    "blocks.0.attention.qkv.weight": (8, 4, 4),
    "blocks.0.mlp.gate_up.weight": (20, 20),
    "blocks.0.mlp.down.weight": (8,),
}
YES, NO = torch.tensor(True), torch.tensor(False)


def make(name, **settings):
    generator = torch.Generator().manual_seed(0)
    model = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}
    return model, build_optimizer(model.items(), OptimConfig(name=name, **settings), BLOCKS)


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def image(model, optimizer):
    tensors = {**{n: p.detach() for n, p in model.items()}, **optimizer.tensors()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_skipped_step_changes_no_bit(name, poison, steps_before):
    model, optimizer = make(name)
    for step in range(steps_before):
        set_gradients(model, step)
        optimizer.step(YES)
    before = image(model, optimizer)
    set_gradients(model, 9)
    if poison is not None:
        for parameter in model.values():
            parameter.grad.view(-1)[::3] = poison
    optimizer.step(NO)
    assert image(model, optimizer) == before
    set_gradients(model, 10)
    optimizer.step(YES)
    after = image(model, optimizer)
    assert all(after[key] != before[key] for key in before)  # and a step changes everything
    assert all(torch.isfinite(t).all() for t in optimizer.tensors().values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_leaves_no_trace_later(name):
    (skipping, a), (plain, b) = make(name), make(name)
    for seed, skip in [(1, False), (2, True), (3, False)]:
        set_gradients(skipping, seed)
        a.step(~torch.tensor(skip))
        if not skip:
            set_gradients(plain, seed)
            b.step(YES)
    assert image(skipping, a) == image(plain, b)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_never_waits_for_the_device(name):
    with FakeTensorMode():  # fake tensors have no values: whoever reads one on the host raises
        model = {n: nn.Parameter(torch.empty(s)) for n, s in SHAPES.items()}
        optimizer = build_optimizer(model.items(), OptimConfig(name=name), BLOCKS)
        for parameter in model.values():
            parameter.grad = torch.empty_like(parameter)
        ok = torch.isfinite(model["head.weight"].grad.sum())
        optimizer.step(ok)
        with pytest.raises(DataDependentOutputException):
            bool(ok)


def test_adamw_equals_torchs_plain_loop():
    config = {"peak_lr": 0.01, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
    model, optimizer = make("adamw", **config)
    twin, _ = make("adamw")
    decayed = [p for n, p in twin.items() if n in {*BLOCKS, "head.weight"}]
    others = [p for n, p in twin.items() if n not in {*BLOCKS, "head.weight"}]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.01, betas=(0.8, 0.9), eps=1e-3, foreach=False, fused=False,
    )  # fmt: skip
    for step, factor in enumerate([0.1, 0.5, 1.0, 0.25]):
        set_gradients(model, step)
        set_gradients(twin, step)
        optimizer.set_rate(factor)
        for group in reference.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.step(YES)
        reference.step()
    for name in model:
        torch.testing.assert_close(model[name], twin[name], rtol=1e-6, atol=1e-7)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizer.tensors()[f"{name}/{key}"], reference.state[twin[name]][key],
                rtol=1e-5, atol=1e-7,
            )  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rate_and_decay_scale_together(name):
    model, optimizer = make(name, peak_lr=0.1, adam_lr=0.02 if name == "muon" else None)
    start = {n: p.detach().clone() for n, p in model.items()}
    optimizer.set_rate(0.0)
    set_gradients(model, 0)
    optimizer.step(YES)
    assert all(torch.equal(p, start[n]) for n, p in model.items())
    # with zero gradients and momentum what remains of a step is its decay
    model, optimizer = make(name, peak_lr=0.1, adam_lr=0.02 if name == "muon" else None)
    optimizer.set_rate(0.5)
    for parameter in model.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(YES)
    head_rate = 0.01 if name == "muon" else 0.05
    shares = dict.fromkeys(BLOCKS, 1 - 0.05 * 0.1) | {"head.weight": 1 - head_rate * 0.1}
    for n, parameter in model.items():
        torch.testing.assert_close(parameter.detach(), start[n] * shares.get(n, 1.0))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_is_whole_before_the_first_step_and_resumes_to_the_bit(name):
    model, optimizer = make(name)
    layout = {k: (t.shape, t.dtype) for k, t in optimizer.tensors().items()}
    assert {t.count_nonzero().item() for t in optimizer.tensors().values()} == {0}
    for step in range(3):
        set_gradients(model, step)
        optimizer.step(YES)
    assert {k: (t.shape, t.dtype) for k, t in optimizer.tensors().items()} == layout

    resumed, other = make(name)
    with torch.no_grad():  # as a checkpoint does it: the live tensors are filled in place
        for key, tensor in other.tensors().items():
            tensor.copy_(optimizer.tensors()[key])
        for n, parameter in resumed.items():
            parameter.copy_(model[n])
    for m, o in ((model, optimizer), (resumed, other)):
        set_gradients(m, 7)
        o.step(YES)
    assert image(model, optimizer) == image(resumed, other)


def test_state_names_follow_the_contract():
    _, optimizer = make("muon")
    assert set(optimizer.tensors()) == {f"{n}/momentum" for n in BLOCKS} | {
        f"{n}/{key}" for n in set(SHAPES) - set(BLOCKS) for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_zero_grad_forgets_and_a_missing_gradient_is_a_bug():
    model, optimizer = make("muon")
    set_gradients(model, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.values())
    with pytest.raises(AssertionError, match="has no gradient"):
        optimizer.step(YES)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_learns(name):
    generator = torch.Generator().manual_seed(0)
    goal = {n: 0.1 * torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    model, optimizer = make(name, peak_lr=0.1, weight_decay=0.0)
    first = sum((p - goal[n]).square().sum() for n, p in model.items()).item()
    for step in range(200):
        loss = sum((p - goal[n]).square().sum() for n, p in model.items())
        loss.backward()
        optimizer.set_rate(1 - step / 200)
        optimizer.step(YES)
        optimizer.zero_grad()
    assert loss.item() < first / 50
