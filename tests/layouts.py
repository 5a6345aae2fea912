"""A small model that is trained on several ranks, for tests of what layouts promise."""

import hashlib

import torch

from summerlm.core.ranks import ALONE
from summerlm.data.batch import IGNORE, Batch
from summerlm.model.config import ModelConfig
from summerlm.optim.build import build_optimizer
from summerlm.optim.config import OptimConfig
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.layout import lay_out
from summerlm.train.config import TrainConfig
from summerlm.train.step import Stepper

CPU = torch.device("cpu")
MODEL = {  # odd sizes: no number of ranks divides all rows
    "vocabulary": 50,
    "width": 18,
    "layers": 2,
    "heads": 3,
    "kv_heads": 1,
    "head_dim": 6,
    "mlp_hidden": 21,
    "mlp_bias": True,
    "context": 12,
    "zero_init_outputs": False,
}
ADAMW = {"name": "adamw", "peak_lr": 0.01}
MUON = {"name": "muon", "peak_lr": 0.01, "newton_schulz_dtype": "float32"}
ROWS = 12


def batch_of(step):
    """The rows of a step of all ranks; some have no targets, so one of 4 ranks has none at all."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 50, (ROWS, 13), generator=draw)
    targets = ids[:, 1:].clone()
    targets[0, :9] = IGNORE
    targets[3::4] = IGNORE
    documents = (torch.rand(ROWS, 12, generator=draw) < 0.2).long().cumsum(1)
    return Batch(ids[:, :-1], targets, documents, torch.arange(ROWS) % 3 % 2)


def rows_of(batch, ranks):
    tensors = (batch.tokens, batch.targets, batch.documents, batch.sources)
    return Batch(*(tensor[ranks.rank :: ranks.world] for tensor in tensors))


def make(ranks=ALONE, parallel=(), optim=(), model=(), train=(), dtype=None):
    """A stepper of the small model; settings as dictionaries."""
    parallel = ParallelConfig(**dict(parallel))
    config = ModelConfig(**MODEL | dict(model))
    layout = lay_out(config, parallel, ranks, seed=1, device=CPU, dtype=dtype)
    optimizer = build_optimizer(
        layout.parts,
        OptimConfig(**ADAMW | dict(optim)),
        layout.model.matrix_blocks(),
        layout.shard_group,
    )
    return Stepper(
        layout,
        optimizer,
        TrainConfig(precision="float32", **dict(train)),
        ranks,
        seed=0,
        dtype=dtype,
        micro_rows=parallel.micro_batch_rows,
        sources=2,
    )


def run_step(stepper, number, **kwargs):
    """Make a step on this rank's rows."""
    batch = batch_of(number)
    count = int((batch.targets != IGNORE).sum())
    return stepper(rows_of(batch, stepper.layout.ranks), number, 1.0, count=count, **kwargs)


def live(stepper):
    """All tensors that a checkpoint holds."""
    parts = {**stepper.layout.parts, **stepper.optimizer.parts()}
    return {name: part.tensor for name, part in parts.items()}


def digest(stepper):
    """One hash over this rank's weights and moments."""
    total = hashlib.sha256()
    for name, tensor in sorted(live(stepper).items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()
