import pytest
import torch
from torch import nn

from summerlm.optim import muon
from summerlm.optim.muon import Muon, orthogonalize

SHAPES = [(24, 24), (16, 40), (40, 16), (1, 12), (33, 7)]
YES = torch.tensor(True)


def parameters(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"m{i}": nn.Parameter(torch.randn(s, generator=generator)) for i, s in enumerate(shapes)
    }


def set_gradients(*models, seed):
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def whole(model):
    return {name: (len(p),) for name, p in model.items()}


def ours(model, blocks=None, dtype=torch.float32, decay=0.1):
    return Muon(model, blocks or whole(model), decay=decay, momentum=0.95, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-3)])
def test_equals_torch_on_plain_matrices(dtype, tolerance, monkeypatch):
    # torch iterates in bfloat16 alone; its float32 twin is had by disarming the one cast
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.to(dtype))
    mine, theirs = parameters(), parameters()
    start = parameters()
    optimizer = ours(mine, dtype=dtype)
    reference = torch.optim.Muon(
        theirs.values(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        set_gradients(mine, theirs, seed=step)
        optimizer.step(0.02, YES)
        reference.step()
    for name in mine:
        assert (mine[name] - start[name]).abs().max() > 0.02  # it moved far beyond the tolerance
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=tolerance)
        buffer = reference.state[theirs[name]]["momentum_buffer"]
        assert torch.equal(optimizer.buffers[name], buffer)


def test_fused_blocks_move_like_matrices_of_their_own():
    rows = (16, 8, 8)
    fused = parameters(shapes=[(32, 12)])
    apart = {
        f"part{i}": nn.Parameter(p.clone()) for i, p in enumerate(fused["m0"].detach().split(rows))
    }
    one, many = ours(fused, {"m0": rows}), ours(apart)
    for step in range(3):
        set_gradients(fused, seed=step)
        for part, gradient in zip(apart.values(), fused["m0"].grad.split(rows), strict=True):
            part.grad = gradient.clone()
        one.step(0.05, YES)
        many.step(0.05, YES)
    joined = torch.cat(list(apart.values()))
    torch.testing.assert_close(fused["m0"], joined, rtol=0, atol=1e-6)
    whole_matrix = parameters(shapes=[(32, 12)])
    plain = ours(whole_matrix)
    for step in range(3):
        set_gradients(whole_matrix, seed=step)
        plain.step(0.05, YES)
    assert (fused["m0"] - whole_matrix["m0"]).abs().max() > 1e-2  # being cut matters


def test_stack_size_changes_nothing(monkeypatch):
    shapes = [(8, 8)] * 5 + [(8, 20), (20, 8), (8, 20)]
    big, small = parameters(shapes=shapes), parameters(shapes=shapes)
    in_big = ours(big)
    monkeypatch.setattr(muon, "STACK_ELEMENTS", 128)
    in_small = ours(small)
    assert sorted(map(len, in_big._stacks)) == [3, 5]  # tall and wide share a stack
    assert sorted(map(len, in_small._stacks)) == [1, 1, 1, 1, 2, 2]
    set_gradients(big, small, seed=0)
    in_big.step(0.1, YES)
    in_small.step(0.1, YES)
    for name in big:
        torch.testing.assert_close(big[name], small[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_update_has_orthogonal_directions_and_adams_size(shape):
    model = parameters(shapes=[shape])
    before = model["m0"].detach().clone()
    set_gradients(model, seed=1)
    ours(model, decay=0.0).step(1.0, YES)
    update = before - model["m0"].detach()
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
