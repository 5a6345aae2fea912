"""One side of a comparison: a process that makes whole training steps when it is asked to.

The job is a JSON object in the first argument:
    side         "ours", "nanogpt", "original", "llama", or "matmul": what this machine multiplies;
    device       "cpu" or "cuda";
    shape        fields of `peers_shape.Shape`;
    compiled, dtype, micro_rows      the mode;
    warm         steps that are made and forgotten, compilation among them;
    tables       ours: the settings `model`, `optim`, `train`, `parallel`;
    repo         nanogpt, original: the checkout;
    size         matmul: rows and columns of the matrices.
When the side is warm it prints a line of JSON about itself, or {"out_of_memory": true} and ends.
Then it answers each number that it reads with a line: seconds of each of so many steps, the loss
of the last, and the most memory that a GPU has held. On a GPU seconds are those between events on
the device, so that a side which runs ahead of it isn't made to wait.

Ids are drawn, the same for all sides, small ones more often than large ones, so that there is
something to learn.
"""

import json
import os
import sys
import time
from itertools import cycle, pairwise
from typing import Any, Protocol

import torch
from peers_shape import Shape
from peers_theirs import Llama, NanoGPT, Original
from torch import Tensor

from summerlm.core.config import validate
from summerlm.core.errors import SummerError
from summerlm.core.ranks import ALONE
from summerlm.data.batch import Batch
from summerlm.model.config import ModelConfig
from summerlm.optim.build import build_optimizer
from summerlm.optim.config import OptimConfig
from summerlm.parallel.config import ParallelConfig
from summerlm.parallel.layout import lay_out
from summerlm.plan.count import flops_per_token, flops_per_token_full, parameters
from summerlm.train.config import TrainConfig, compute_dtype
from summerlm.train.step import Stepper

BATCHES = 8  # different ones, taken in turn


class Trainer(Protocol):
    """What makes steps."""

    parameters: int

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Make one step of forward, loss, backward, clipping and update; gives the loss, ()."""


class Ours:
    """The product's own step, as its loop makes it.

    Args:
        job: What this process was started with.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        device, tables = torch.device(job["device"]), job["tables"]
        mode = {"compile": job["compiled"], "micro_batch_rows": job["micro_rows"]}
        model = validate(ModelConfig, tables["model"], "model")
        parallel = validate(ParallelConfig, {**tables["parallel"], **mode}, "parallel")
        train = validate(TrainConfig, {**tables["train"], "precision": job["dtype"]}, "train")
        optim = validate(OptimConfig, tables["optim"], "optim")
        dtype = compute_dtype(train, device)
        self._layout = lay_out(model, parallel, ALONE, seed=0, device=device, dtype=dtype)
        optimizer = build_optimizer(
            self._layout.parts, optim, self._layout.model.matrix_blocks(), None
        )
        self._stepper = Stepper(
            self._layout,
            optimizer,
            train,
            ALONE,
            seed=0,
            dtype=dtype,
            micro_rows=job["micro_rows"],
            sources=1,
        )
        self._number, self._last = 0, torch.zeros(())
        self.parameters = parameters(model)
        self.words = {
            "kernel": self._layout.model.positions.kernel,
            "flops_per_token": flops_per_token(model),
            "torchtitan_flops_per_token": flops_per_token_full(model),
        }

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Make one step on (B, T) each; the host reads the loss of the step before, as the loop."""
        self._number += 1
        documents = torch.zeros_like(tokens)
        batch = Batch(tokens, targets, documents, documents[:, 0])
        result = self._stepper(batch, self._number, 1.0, count=targets.numel())
        self._last.item()
        self._last = result.loss
        return result.loss


class Matmul:
    """Square matrices: what this machine reaches at most.

    Args:
        job: What this process was started with.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        size, dtype = job["size"], getattr(torch, job["dtype"])
        self._left, self._right = torch.randn(2, size, size, device=job["device"]).to(dtype)
        self.parameters = size * size
        self.words = {"flops": 2 * size**3}

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Multiply once."""
        return (self._left @ self._right)[0, 0]


SIDES = {
    "ours": Ours,
    "nanogpt": NanoGPT,
    "original": Original,
    "llama": Llama,
    "matmul": Matmul,
}


class Side:
    """A trainer with its rows and its clock.

    Args:
        job: What this process was started with.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._cuda = job["device"] == "cuda"
        shape = Shape(**job["shape"])
        torch.manual_seed(0)
        self._trainer: Trainer = SIDES[job["side"]](job)
        draw = torch.Generator().manual_seed(0)
        ids = torch.rand(BATCHES, shape.rows, shape.context + 1, generator=draw)
        rows = (ids**4 * shape.vocabulary).long().to(job["device"])
        self._batches = cycle([(r[:, :-1].contiguous(), r[:, 1:].contiguous()) for r in rows])

    def about(self, first_loss: float) -> dict[str, Any]:
        """Say what is measured."""
        words: dict[str, Any] = getattr(self._trainer, "words", {})
        return {
            "parameters": self._trainer.parameters,
            "threads": torch.get_num_threads(),
            "first_loss": first_loss,
            **words,
        }

    def steps(self, count: int) -> dict[str, Any]:
        """Make steps.

        Args:
            count: How many, at least one.

        Returns:
            Seconds of each, the last one's loss, and the peak of the allocator.
        """
        marks = [self._mark()]
        for _ in range(count):
            loss = self._trainer.step(*next(self._batches))
            marks.append(self._mark())
        last = loss.item()
        seconds = [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairwise(marks)]
        peak = torch.cuda.max_memory_allocated() if self._cuda else None
        return {"seconds": seconds, "loss": last, "peak_bytes": peak}

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def main() -> None:
    job = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what peers print is no answer
    try:
        side = Side(job)
        first = side.steps(1)["loss"]
        if job["warm"] > 1:
            side.steps(job["warm"] - 1)
    except torch.OutOfMemoryError:
        print(json.dumps({"out_of_memory": True}), file=answers)
        return
    except SummerError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(side.about(first)), file=answers)
    for line in sys.stdin:
        print(json.dumps(side.steps(int(line))), file=answers)


if __name__ == "__main__":
    main()
