import pytest
import torch
import torch.nn.functional as F
from models import build

from summerlm.core.errors import UsageError
from summerlm.core.ranks import ALONE
from summerlm.data.batch import IGNORE, Batch
from summerlm.model.config import ModelConfig
from summerlm.optim.build import build_optimizer
from summerlm.optim.config import OptimConfig
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.layout import lay_out
from summerlm.train.config import TrainConfig, compute_dtype
from summerlm.train.step import Stepper

MODEL = ModelConfig(
    vocabulary=50,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_hidden=24,
    context=12,
    zero_init_outputs=False,
)


def make(model_changes=None, *, train=None, micro_rows=None, seed=0):
    model_config = MODEL.model_copy(update=model_changes or {})
    cpu = torch.device("cpu")
    layout = lay_out(model_config, ParallelConfig(), ALONE, seed=1, device=cpu, dtype=None)
    optim = OptimConfig(name="adamw", peak_lr=0.01, weight_decay=0)
    optimizer = build_optimizer(layout.parts, optim, layout.model.matrix_blocks())
    config = train or TrainConfig(clip_norm=None, precision="float32")
    return Stepper(
        layout, optimizer, config, ALONE, seed=seed, dtype=None, micro_rows=micro_rows, sources=2
    )


def step(stepper, batch, number, rate=1.0, **kwargs):
    return stepper(batch, number, rate, count=int((batch.targets != IGNORE).sum()), **kwargs)


def make_batch(rows=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (rows, 13), generator=draw)
    targets = ids[:, 1:].clone()
    targets[0, :9] = IGNORE  # rows count differently
    targets[3, 5] = IGNORE
    documents = (torch.rand(rows, 12, generator=draw) < 0.2).long().cumsum(1)
    return Batch(ids[:, :-1], targets, documents, torch.tensor([0, 1, 1, 0, 1, 0])[:rows])


def gradients(stepper):
    return {name: p.grad.clone() for name, p in stepper.layout.model.named_parameters()}


@pytest.mark.parametrize("micro_rows", [None, 1, 2, 4, 5, 6, 9])
def test_loss_and_gradient_are_those_of_the_plain_mean(micro_rows):
    stepper, batch = make(micro_rows=micro_rows), make_batch()
    reference = build(MODEL, seed=1)
    logits = reference.logits(reference(batch.tokens, batch.documents))
    mean = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    mean.backward()
    result = step(stepper, batch, 1)
    assert result.ok
    torch.testing.assert_close(result.loss, mean.detach())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients(stepper)[name], parameter.grad, msg=name)
    norm = torch.stack([p.grad.square().sum() for p in reference.parameters()]).sum().sqrt()
    torch.testing.assert_close(result.grad_norm, norm)


def test_loss_by_source_sums_to_the_loss():
    batch = make_batch()
    result = step(make(micro_rows=4), batch, 1)
    assert result.source_targets.tolist() == [
        int((batch.targets[batch.sources == s] != IGNORE).sum()) for s in (0, 1)
    ]
    mean = result.source_nats.sum() / result.source_targets.sum()
    torch.testing.assert_close(mean.float(), result.loss)


def test_clipping_bounds_the_update_and_reports_the_norm_before():
    free, clipped = make(), make(train=TrainConfig(clip_norm=1e-3, precision="float32"))
    batch = make_batch()
    first, second = step(free, batch, 1), step(clipped, batch, 1)
    torch.testing.assert_close(first.grad_norm, second.grad_norm)
    norm = torch.stack([g.square().sum() for g in gradients(clipped).values()]).sum().sqrt()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_bit(poison, where):
    stepper, batch = make(), make_batch()
    step(stepper, batch, 1)
    weight = stepper.layout.model.blocks[0].mlp.down.weight
    if where == "gradient":
        handle = weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), poison))
    else:
        handle = stepper.layout.model.final_norm.register_forward_hook(lambda *a: a[-1] * poison)
    parts = {**stepper.layout.parts, **stepper.optimizer.parts()}
    tensors = {name: part.tensor for name, part in parts.items()}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    result = step(stepper, batch, 2)
    assert not result.ok
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
    handle.remove()
    assert step(stepper, batch, 3).ok
    assert not torch.equal(weight, before["blocks.0.mlp.down.weight"])


def test_dropout_depends_on_seed_step_and_nothing_before():
    batch = make_batch()
    drop = {"dropout": 0.3}

    def losses(seed, numbers):
        stepper = make(drop, seed=seed)
        stepper.layout.model.train()
        return [step(stepper, batch, n, rate=0.0).loss.item() for n in numbers]

    one, two = losses(0, [1, 2])
    assert one != two
    torch.rand(5)
    assert losses(0, [2]) == [two]
    assert losses(1, [2]) != [two]


def test_precision_is_what_was_asked_for(monkeypatch):
    cpu = torch.device("cpu")
    assert compute_dtype(TrainConfig(precision="float32"), cpu) is None
    assert compute_dtype(TrainConfig(precision="bfloat16"), cpu) is torch.bfloat16
    for supported, expected in [(True, torch.bfloat16), (False, None)]:
        monkeypatch.setattr("summerlm.train.config.supports_bf16", lambda _, s=supported: s)
        assert compute_dtype(TrainConfig(), cpu) is expected
    with pytest.raises(UsageError, match="this GPU has none"):
        compute_dtype(TrainConfig(precision="bfloat16"), torch.device("cuda"))
