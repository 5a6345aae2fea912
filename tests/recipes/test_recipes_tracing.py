"""A traced step against the same step really made, and against the sizes of real tensors."""

from contextlib import nullcontext

import pytest
import torch

from summerlm.core.ranks import ALONE
from summerlm.optim.build import build_optimizer
from summerlm.parallel.layout import lay_out
from summerlm.plan.memory import Sharing, spread
from summerlm.recipes import tracing
from summerlm.recipes.tracing import trace_step

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def changed(settings, **sections):
    """Settings with some values replaced, as `model={"layers": 3}`."""
    update = {
        name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()
    }
    return settings.model_copy(update=update)


def real(monkeypatch, *args, **kwargs):
    """The same trace on tensors with values."""
    with monkeypatch.context() as patch:
        patch.setattr(tracing, "FakeTensorMode", nullcontext)
        return trace_step(*args, **kwargs)


CASES = {
    "plain": {},
    "adamw": {"optim": {"name": "adamw", "adam_lr": None}},
    "tied": {"model": {"tied_embeddings": True}},
    "dropout": {"model": {"dropout": 0.1}},
    "full": {"parallel": {"recompute": "full"}},
    "selective": {"parallel": {"recompute": "selective"}},
    "sdpa": {"parallel": {"attention": "sdpa"}},
    "one layer": {"model": {"layers": 1}},
}


@pytest.mark.parametrize("dtype", [None, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_without_values_as_with(tiny_settings, monkeypatch, case, dtype):
    settings = changed(tiny_settings, **CASES[case])
    for micro_batches in (1, 2):
        args = (settings, 3, micro_batches, dtype)
        fake = trace_step(*args, gpu=False)
        found = real(monkeypatch, *args, gpu=False)
        assert fake.keys() == found.keys()
        for stretch, kinds in found.items():
            total = sum(kinds.values())
            assert sum(fake[stretch].values()) == pytest.approx(total, rel=0.002, abs=64), stretch


@pytest.mark.parametrize("layers", [5, 9])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_deep_models_are_extended_as_they_are(
    tiny_settings, monkeypatch, layers, micro_batches, recompute
):
    settings = changed(tiny_settings, model={"layers": layers}, parallel={"recompute": recompute})
    extended = trace_step(settings, 2, micro_batches, BF16, gpu=False)
    monkeypatch.setattr(tracing, "FEW_LAYERS", 99)
    exact = trace_step(settings, 2, micro_batches, BF16, gpu=False)
    mine, whole = spread(extended, Sharing()), spread(exact, Sharing())
    assert mine.total == pytest.approx(whole.total, rel=0.002)
    for stretch in ("state", "forward", "loss", "last block", "first block"):
        total = sum(exact[stretch].values())
        assert sum(extended[stretch].values()) == pytest.approx(total, rel=0.002), stretch


def test_state_is_that_of_real_tensors(tiny_settings):
    layout = lay_out(
        tiny_settings.model, tiny_settings.parallel, ALONE, seed=0, device=CPU, dtype=None
    )
    optimizer = build_optimizer(
        layout.parts, tiny_settings.optim, layout.model.matrix_blocks(), None
    )
    state = trace_step(tiny_settings, 2, 2, None, gpu=False)["state"]
    weights = sum(p.numel() * 4 for p in layout.model.parameters())
    assert state["weights"] == weights
    moments = sum(p.tensor.numel() * 4 for p in optimizer.parts().values())
    assert state["optimizer"] == moments
    assert state["buffers"] == sum(b.nbytes for b in layout.model.buffers())


def test_second_micro_batch_finds_the_gradients_of_the_first(tiny_settings):
    one, two = (trace_step(tiny_settings, 2, n, None, gpu=False) for n in (1, 2))
    assert one["loss"].get("gradients", 0) == 0
    assert two["loss"]["gradients"] == two["loss"]["weights"]
    assert trace_step(tiny_settings, 2, 7, None, gpu=False) == two


def test_more_rows_need_more_and_recomputation_less(tiny_settings):
    def need(rows, recompute=None):
        # long rows of many layers: activations decide
        settings = changed(tiny_settings, model={"layers": 8}, parallel={"recompute": recompute})
        return spread(trace_step(settings, rows, 2, BF16, gpu=True), Sharing()).total

    found = [need(rows) for rows in (1, 2, 4, 8, 16)]
    assert found == sorted(set(found))
    assert need(16) > need(16, "selective") > need(16, "full")
    # linear, once a chunk of the loss is full
    assert need(256) - need(192) == pytest.approx(need(192) - need(128), rel=1e-3)


def test_gpus_keep_no_scores(tiny_settings):
    """Fused kernels keep a logarithm a row: doubling the context doubles what is kept."""

    def kept(context, **model):
        settings = changed(tiny_settings, model={"context": context, **model})
        return trace_step(settings, 1, 1, BF16, gpu=True)["loss"]["activations"]

    for dropout in (0.0, 0.1):
        some, more, most = (kept(context, dropout=dropout) for context in (256, 512, 1024))
        assert most - more == pytest.approx(2 * (more - some), rel=0.02)
