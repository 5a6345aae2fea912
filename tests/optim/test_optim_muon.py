import pytest
import torch
from torch import nn

from summerlm.core.parts import Part
from summerlm.optim import muon
from summerlm.optim.muon import Muon, orthogonalize

SHAPES = [(24, 24), (16, 40), (40, 16), (1, 12), (33, 7)]
YES = torch.tensor(True)


def parameters(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {f"m{i}": torch.randn(s, generator=generator) for i, s in enumerate(shapes)}


def random_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.items()}


def whole(model):
    return {name: (len(p),) for name, p in model.items()}


def ours(model, blocks=None, dtype=torch.float32, decay=0.1):
    parts = {name: Part.whole(p) for name, p in model.items()}
    return Muon(parts, blocks or whole(model), decay=decay, momentum=0.95, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-3)])
def test_equals_torch_on_plain_matrices(dtype, tolerance, monkeypatch):
    # torch iterates in bfloat16 alone; its float32 twin is had by disarming the one cast
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.to(dtype))
    mine, start = parameters(), parameters()
    theirs = {name: nn.Parameter(p.clone()) for name, p in start.items()}
    optimizer = ours(mine, dtype=dtype)
    reference = torch.optim.Muon(
        theirs.values(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        gradients = random_gradients(mine, step)
        for name, parameter in theirs.items():
            parameter.grad = gradients[name]
        optimizer.step(gradients, 0.02, YES)
        reference.step()
    for name in mine:
        assert (mine[name] - start[name]).abs().max() > 0.02  # it moved far beyond the tolerance
        torch.testing.assert_close(mine[name], theirs[name].detach(), rtol=0, atol=tolerance)
        buffer = reference.state[theirs[name]]["momentum_buffer"]
        assert torch.equal(optimizer.buffers[name], buffer)


def test_fused_blocks_move_like_matrices_of_their_own():
    rows = (16, 8, 8)
    fused = parameters(shapes=[(32, 12)])
    apart = {f"part{i}": p.clone() for i, p in enumerate(fused["m0"].split(rows))}
    one, many = ours(fused, {"m0": rows}), ours(apart)
    for step in range(3):
        gradients = random_gradients(fused, step)
        one.step(gradients, 0.05, YES)
        many.step(dict(zip(apart, gradients["m0"].split(rows), strict=True)), 0.05, YES)
    joined = torch.cat(list(apart.values()))
    torch.testing.assert_close(fused["m0"], joined, rtol=0, atol=1e-6)
    whole_matrix = parameters(shapes=[(32, 12)])
    plain = ours(whole_matrix)
    for step in range(3):
        plain.step(random_gradients(whole_matrix, step), 0.05, YES)
    assert (fused["m0"] - whole_matrix["m0"]).abs().max() > 1e-2  # being cut matters


def test_stack_size_changes_nothing(monkeypatch):
    shapes = [(8, 8)] * 5 + [(8, 20), (20, 8), (8, 20)]
    big, small = parameters(shapes=shapes), parameters(shapes=shapes)
    in_big = ours(big)
    monkeypatch.setattr(muon, "STACK_ELEMENTS", 128)
    in_small = ours(small)
    assert [len(e.longer) for e in in_big._rounds] == [8]
    assert sorted(len(e.longer) for e in in_small._rounds) == [1, 1, 1, 1, 2, 2]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(
            muon, "orthogonalize", lambda x, d: seen.append(x.shape) or orthogonalize(x, d)
        )
        in_big.step(random_gradients(big, 0), 0.1, YES)
    assert sorted(map(tuple, seen)) == [(3, 8, 20), (5, 8, 8)]  # tall and wide share a stack
    in_small.step(random_gradients(small, 0), 0.1, YES)
    for name in big:
        torch.testing.assert_close(big[name], small[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_update_has_orthogonal_directions_and_adams_size(shape):
    model = parameters(shapes=[shape])
    before = model["m0"].clone()
    ours(model, decay=0.0).step(random_gradients(model, 1), 1.0, YES)
    update = before - model["m0"]
    values = torch.linalg.svdvals(update / (0.2 * max(shape) ** 0.5))
    assert values.max() < 1.3
    assert values.median() > 0.6
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_a_zero_gradient_leaves_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4), torch.float32), torch.zeros(2, 3, 4))


def test_float32_answers_a_small_change_with_a_small_change():
    """What makes layouts agree: bfloat16 turns a change of 1e-7 into one of 1e-2."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(4, 32, 48, generator=generator)
    nudged = stack + 1e-7 * torch.randn(stack.shape, generator=generator)
    change = orthogonalize(stack, torch.float32) - orthogonalize(nudged, torch.float32)
    assert change.abs().max() < 1e-5


def test_blocks_must_cover_the_rows():
    with pytest.raises(AssertionError, match="m0"):
        ours(parameters(shapes=[(8, 4)]), {"m0": (4, 3)})
