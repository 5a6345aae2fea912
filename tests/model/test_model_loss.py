"""The chunked loss against `F.cross_entropy` in float64, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from summerlm.model.loss import IGNORE, next_token_loss


def reference(hidden, head, targets, vocabulary, soft_cap, z_loss):
    """Sum of losses in float64 by torch's own functions, all logits at once."""
    logits = hidden.double() @ head.double()[:vocabulary].T
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    per_target = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    partition = logits.logsumexp(-1)[targets != IGNORE]
    return per_target.sum() + z_loss * partition.square().sum(), per_target


def problem(N, D, vocabulary, padded, dtype=torch.float32, ignored=0.2):
    torch.manual_seed(N * 7 + D)
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    head = torch.randn(padded, D).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (N,)).where(torch.rand(N) >= ignored, IGNORE)
    return hidden, head, targets


@pytest.mark.parametrize("chunk", [1, 7, 37, 1000])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(("vocabulary", "padded"), [(128, 128), (101, 128), (3, 256)])
def test_equals_cross_entropy(chunk, soft_cap, z_loss, vocabulary, padded):
    hidden, head, targets = problem(37, 9, vocabulary, padded)
    loss = next_token_loss(
        hidden,
        head,
        targets,
        vocabulary=vocabulary,
        soft_cap=soft_cap,
        z_loss=z_loss,
        chunk_tokens=chunk,
    )
    (loss.total / 3).backward()
    total, per_target = reference(hidden, head, targets, vocabulary, soft_cap, z_loss)
    expected = torch.autograd.grad(total / 3, (hidden, head))
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(loss.per_target.double(), per_target, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), expected[0].double(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(head.grad.double(), expected[1].double(), rtol=1e-5, atol=2e-5)
    assert loss.count == (targets != IGNORE).sum()
    assert loss.count.dtype == torch.int64
    assert not loss.per_target.requires_grad
    assert (head.grad[vocabulary:] == 0).all()


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_low_precision(how):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    hidden, head, targets = problem(50, 64, 300, 384, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = next_token_loss(hidden, head, targets, vocabulary=300, chunk_tokens=16)
    loss.total.backward()
    total, per_target = reference(hidden, head, targets, 300, None, 0.0)
    expected = torch.autograd.grad(total, (hidden, head))
    assert loss.total.dtype == loss.per_target.dtype == torch.float32
    assert hidden.grad.dtype == head.grad.dtype == dtype
    # logits of standard deviation 8 rounded to 8 bits
    torch.testing.assert_close(loss.per_target.double(), per_target, rtol=0.01, atol=0.1)
    for got, want in zip((hidden.grad, head.grad), expected, strict=True):
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < 0.02


def test_padded_logits_never_win():
    """A padded row that points exactly where the hidden states do changes nothing."""
    hidden, head, targets = problem(20, 8, 100, 128, ignored=0)
    with torch.no_grad():
        small = next_token_loss(hidden, head, targets, vocabulary=100)
        head[100:] = 1e4 * hidden[:28].mean(0)
        large = next_token_loss(hidden, head, targets, vocabulary=100)
    assert torch.equal(small.per_target, large.per_target)


def test_sums_do_not_depend_on_the_split():
    hidden, head, targets = problem(60, 8, 100, 128)
    whole = next_token_loss(hidden, head, targets, vocabulary=100)
    parts = [
        next_token_loss(h, head, t, vocabulary=100)
        for h, t in zip(hidden.split(17), targets.split(17), strict=True)
    ]
    torch.testing.assert_close(sum(p.total for p in parts), whole.total)
    assert sum(p.count for p in parts) == whole.count
    expected = torch.autograd.grad(whole.total, head)[0]
    torch.testing.assert_close(
        torch.autograd.grad(sum(p.total for p in parts), head)[0], expected, rtol=1e-5, atol=1e-5
    )


def test_without_gradients():
    hidden, head, targets = problem(20, 8, 100, 128)
    with_gradients = next_token_loss(hidden, head, targets, vocabulary=100)
    with torch.no_grad():
        without = next_token_loss(hidden, head, targets, vocabulary=100)
    assert not without.total.requires_grad
    assert torch.equal(with_gradients.total, without.total)


def test_extreme_logits_stay_finite():
    hidden, head = torch.full((4, 2), 1e3).requires_grad_(), torch.full((128, 2), 1e3)
    head[1] = -1e3
    loss = next_token_loss(hidden, head, torch.tensor([0, 1, 2, IGNORE]), vocabulary=100)
    loss.total.backward()
    assert loss.per_target[1] > 1e6
    assert torch.isfinite(hidden.grad).all()


def test_all_ignored():
    hidden, head, _ = problem(5, 8, 100, 128)
    loss = next_token_loss(hidden, head, torch.full((5,), IGNORE), vocabulary=100, z_loss=0.1)
    loss.total.backward()
    assert loss.total == 0
    assert loss.count == 0
    assert (hidden.grad == 0).all()
    assert (head.grad == 0).all()


def test_disagreeing_lengths():
    with pytest.raises(ValueError, match="3 hidden states but 4 targets"):
        next_token_loss(
            torch.zeros(3, 8), torch.zeros(128, 8), torch.zeros(4).long(), vocabulary=128
        )


def peak_bytes(work):
    """Run `work` and measure by the allocator's own events how far memory rises."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    del kept
    return peak


def test_peak_memory():
    """The loss holds one chunk's logits and its gradients, never all logits."""
    N, D, V, chunk = 2048, 16, 4096, 128
    hidden, head, targets = problem(N, D, V, V)

    def chunked():
        loss = next_token_loss(hidden, head, targets, vocabulary=V, chunk_tokens=chunk)
        loss.total.backward()

    def plain():
        F.cross_entropy(hidden @ head.T, targets, reduction="sum").backward()

    logits = N * V * 4
    assert peak_bytes(plain) > 2 * logits  # the instrument sees what it should
    gradients = 2 * (N * D + V * D) * 4
    assert peak_bytes(chunked) < 3 * chunk * V * 4 + 2 * gradients < logits
