import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from summerlm.core.parts import Part
from summerlm.optim import adamw
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
    model = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    return model, build(model, OptimConfig(name=name, **settings))


def build(model, config):
    return build_optimizer({n: Part.whole(t) for n, t in model.items()}, config, BLOCKS)


def random_gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def state(optimizer):
    return {name: part.tensor for name, part in optimizer.parts().items()}


def image(model, optimizer):
    tensors = {**model, **state(optimizer)}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_skipped_step_changes_no_bit(name, poison, steps_before):
    model, optimizer = make(name)
    for step in range(steps_before):
        optimizer.step(random_gradients(step), YES)
    before = image(model, optimizer)
    gradients = random_gradients(9)
    if poison is not None:
        for gradient in gradients.values():
            gradient.view(-1)[::3] = poison
    assert optimizer.step(gradients, NO) == 0
    assert image(model, optimizer) == before
    optimizer.step(random_gradients(10), YES)
    after = image(model, optimizer)
    assert all(after[key] != before[key] for key in before)  # and a step changes everything
    assert all(torch.isfinite(t).all() for t in state(optimizer).values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_leaves_no_trace_later(name):
    (skipping, a), (plain, b) = make(name), make(name)
    for seed, skip in [(1, False), (2, True), (3, False)]:
        a.step(random_gradients(seed), ~torch.tensor(skip))
        if not skip:
            b.step(random_gradients(seed), YES)
    assert image(skipping, a) == image(plain, b)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_never_waits_for_the_device(name):
    with FakeTensorMode():  # fake tensors have no values: whoever reads one on the host raises
        model = {n: torch.empty(s) for n, s in SHAPES.items()}
        optimizer = build(model, OptimConfig(name=name))
        gradients = {n: torch.empty(s) for n, s in SHAPES.items()}
        ok = torch.isfinite(gradients["head.weight"].sum())
        optimizer.step(gradients, ok)
        with pytest.raises(DataDependentOutputException):
            bool(ok)


def test_adamw_equals_torchs_plain_loop():
    config = {"peak_lr": 0.01, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
    model, optimizer = make("adamw", **config)
    twin = {n: nn.Parameter(p.clone()) for n, p in model.items()}
    decayed = [p for n, p in twin.items() if n in {*BLOCKS, "head.weight"}]
    others = [p for n, p in twin.items() if n not in {*BLOCKS, "head.weight"}]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.01, betas=(0.8, 0.9), eps=1e-3, foreach=False, fused=False,
    )  # fmt: skip
    for step, factor in enumerate([0.1, 0.5, 1.0, 0.25]):
        for name, gradient in random_gradients(step).items():
            twin[name].grad = gradient
        optimizer.set_rate(factor)
        for group in reference.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.step(random_gradients(step), YES)
        reference.step()
    for name in model:
        torch.testing.assert_close(model[name], twin[name].detach(), rtol=1e-6, atol=1e-7)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                state(optimizer)[f"{name}/{key}"], reference.state[twin[name]][key],
                rtol=1e-5, atol=1e-7,
            )  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rate_and_decay_scale_together(name):
    model, optimizer = make(name, peak_lr=0.1, adam_lr=0.02 if name == "muon" else None)
    start = {n: p.clone() for n, p in model.items()}
    optimizer.set_rate(0.0)
    assert optimizer.step(random_gradients(0), YES) == 0
    assert all(torch.equal(p, start[n]) for n, p in model.items())
    # with zero gradients and momentum what remains of a step is its decay
    model, optimizer = make(name, peak_lr=0.1, adam_lr=0.02 if name == "muon" else None)
    optimizer.set_rate(0.5)
    optimizer.step({n: torch.zeros(s) for n, s in SHAPES.items()}, YES)
    head_rate = 0.01 if name == "muon" else 0.05
    shares = dict.fromkeys(BLOCKS, 1 - 0.05 * 0.1) | {"head.weight": 1 - head_rate * 0.1}
    for n, parameter in model.items():
        torch.testing.assert_close(parameter, start[n] * shares.get(n, 1.0))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_is_whole_before_the_first_step_and_resumes_to_the_bit(name):
    model, optimizer = make(name)
    layout = {k: (t.shape, t.dtype) for k, t in state(optimizer).items()}
    assert {t.count_nonzero().item() for t in state(optimizer).values()} == {0}
    for step in range(3):
        optimizer.step(random_gradients(step), YES)
    assert {k: (t.shape, t.dtype) for k, t in state(optimizer).items()} == layout

    resumed, other = make(name)
    for key, tensor in state(other).items():  # as a checkpoint does it: filled in place
        tensor.copy_(state(optimizer)[key])
    for n, parameter in resumed.items():
        parameter.copy_(model[n])
    for o in (optimizer, other):
        o.step(random_gradients(7), YES)
    assert image(model, optimizer) == image(resumed, other)


def test_state_names_follow_the_contract():
    _, optimizer = make("muon")
    assert set(optimizer.parts()) == {f"{n}/momentum" for n in BLOCKS} | {
        f"{n}/{key}" for n in set(SHAPES) - set(BLOCKS) for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_a_gradient_of_another_shape_is_a_bug():
    _, optimizer = make("muon")
    gradients = random_gradients(0)
    gradients["head.weight"] = gradients["head.weight"][:1]  # it would broadcast
    with pytest.raises(AssertionError, match=r"head\.weight"):
        optimizer.step(gradients, YES)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_learns(name):
    generator = torch.Generator().manual_seed(0)
    goal = {n: 0.1 * torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    model, optimizer = make(name, peak_lr=0.1, weight_decay=0.0)
    first = sum((p - goal[n]).square().sum() for n, p in model.items()).item()
    for step in range(200):
        optimizer.set_rate(1 - step / 200)
        optimizer.step({n: 2 * (p - goal[n]) for n, p in model.items()}, YES)
    loss = sum((p - goal[n]).square().sum() for n, p in model.items())
    assert loss.item() < first / 50


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_update_norm_is_that_of_the_change_of_all_weights(name, chunk, monkeypatch):
    monkeypatch.setattr(adamw, "CHUNK_ELEMENTS", chunk)
    model, optimizer = make(name, peak_lr=0.3, weight_decay=0.5, decay_all=True, beta1=0.8, eps=0.1)
    for step, factor in enumerate([1.0, 0.3, 0.7]):
        before = {n: p.double() for n, p in model.items()}
        optimizer.set_rate(factor)
        norm = optimizer.step(random_gradients(step), YES)
        changes = [(p - before[n]).square().sum() for n, p in model.items()]
        assert norm.item() == pytest.approx(torch.stack(changes).sum().sqrt().item(), rel=1e-5)
