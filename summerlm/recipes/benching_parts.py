"""The parts of a configuration's speed, each measured on a run that is open.

Flow: `benching.bench` makes a `Bench` and calls its methods, whose names are the parts'; every rank
does so. The run's loop goes on from one to the next; nothing hangs on its steps.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch

from summerlm.core.figures import spread
from summerlm.core.hardware import peak_flops
from summerlm.core.record import Recorder
from summerlm.core.runtime import StopRequest
from summerlm.generate.engine import LanguageModel
from summerlm.plan.count import flops_per_token, flops_per_token_full
from summerlm.recipes.breakdown import break_down
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.opening import Run
from summerlm.recipes.pretrain import equip, make_steps
from summerlm.recipes.profiling import STEPS, record_steps
from summerlm.recipes.recording import peak_memory
from summerlm.recipes.watching import evaluating
from summerlm.train.loop import Event
from summerlm.train.saving import resume

PARTS = ("step", "parts", "data", "checkpoint", "generation")
WARM_UP = 5  # steps before any that is measured: the first compile, and caches fill
MEASURED = 20  # steps
DATA_SECONDS = 3.0  # the loader alone is measured for so long, and for MEASURED steps
REPEATS = 3  # of saves, loads and completions
WRITTEN = 64  # tokens of a completion
MOST_STEPS = 50  # made beside a save; one that takes longer is waited for
NEEDED = WARM_UP + MEASURED + STEPS + REPEATS * (1 + MOST_STEPS) + 2  # steps that a run must have


class Saves:
    """A sink that keeps what a run says of its saves."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, kind: str, fields: dict[str, Any], line: str | None) -> None:
        """Take one event."""
        if kind == "save":
            self.rows.append(fields)

    def close(self) -> None:
        """Keep them."""


class Bench:
    """A run whose parts are measured one by one.

    Args:
        run: The run, in a folder that is nobody's.
        stop: A request to stop.
    """

    def __init__(self, run: Run, stop: StopRequest) -> None:
        self._run, self._saves = run, Saves()
        self._gear = equip(run, Recorder([self._saves]), stop)
        self._steps = make_steps(run, self._gear, stop)
        self._event: Event | None = None
        self._warm = False

    def step(self) -> dict[str, Any]:
        """Measure steps of the loop, data and messages included, nothing hung on them.

        Returns:
            `seconds` of a step, `tokens` in it, tokens/s at the median, and of all devices FLOP/s
            and MFU in both ways of counting, None where the peak is unknown; memory at its peak.
        """
        self._warm_up()
        settings = self._run.settings
        waits: list[float] = []

        def one_step() -> None:
            waits.append(self._make(1).data.wait_s)

        seconds = spread([_timed(one_step) for _ in range(MEASURED)])
        tokens = settings.train.batch_tokens
        speed = tokens / seconds["median"]
        peak = peak_flops(self._run.device)
        flops = {
            "causal": flops_per_token(settings.model),
            "full": flops_per_token_full(settings.model),
        }
        return {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": speed,
            "data_wait_s": spread(waits),
            "flops_per_second": {way: speed * count for way, count in flops.items()},
            "mfu": {
                way: speed * count / (peak * self._run.ranks.world) if peak else None
                for way, count in flops.items()
            },
            "memory_bytes": peak_memory(self._run.device),
        }

    def parts(self) -> dict[str, Any]:
        """Profile some steps.

        Returns:
            What `break_down` returns; on ranks that don't lead the same steps are made without.
        """
        self._warm_up()
        run = self._run
        if not run.ranks.leads:
            self._make(STEPS)
            return {}
        trace = run.folder.path / "trace.json.gz"
        compiled = run.settings.parallel.compile
        for event in record_steps(
            self._steps, STEPS, run.layout.model, run.device, compiled, trace
        ):
            self._event = event
        return break_down(trace)

    def data(self) -> dict[str, Any]:
        """Measure the loader alone, from the run's first step on.

        Returns:
            `workers`, `seconds` for so many `tokens`, and their quotient, of all ranks.
        """
        settings, ranks = self._run.settings, self._run.ranks
        loader = open_loader(
            settings,
            self._run.sources,
            self._run.tokenizer,
            None,
            rank=ranks.rank,
            world=ranks.world,
        )
        try:
            for _ in range(1 + settings.data.prefetch_steps):  # what lies ready is no speed
                next(loader)
            steps, start = 0, time.perf_counter()
            while steps < MEASURED or time.perf_counter() - start < DATA_SECONDS:
                next(loader)
                steps += 1
            seconds = time.perf_counter() - start
        finally:
            loader.close()
        rates = ranks.exchange(steps * settings.train.batch_tokens / ranks.world / seconds)
        return {
            "workers": settings.data.workers,
            "seconds": seconds,
            "tokens": steps * settings.train.batch_tokens,
            "tokens_per_second": min(rates) * ranks.world,
        }

    def checkpoint(self) -> dict[str, Any]:
        """Save while steps are made, and load what was saved, a few times.

        Returns:
            `bytes`, `stall_s` (training stands still), `seconds` (until it is published), `load_s`
            (verified and filled in; the files are still in the system's memory).
        """
        run, saver, rows, loads = self._run, self._gear.saver, self._saves.rows, []
        for repeat in range(REPEATS):
            saver.save(self._make(1))
            for _ in range(MOST_STEPS):
                if any(run.ranks.exchange(len(rows) > repeat)):  # on the leading rank
                    break
                saver.poll(self._make(1).data.reports)
            saver.finish()
            loads.append(_timed(partial(resume, run.store, run.tables, run.ranks)))
        if not run.ranks.leads:
            return {}
        return {
            "bytes": rows[-1]["bytes"],
            "stall_s": spread([row["stall_s"] for row in rows]),
            "seconds": spread([row["seconds"] for row in rows]),
            "load_s": spread(loads),
        }

    def generation(self) -> dict[str, Any]:
        """Complete half a row of the data as samples of the run do, in its dtype.

        Returns:
            `prompt_tokens`, tokens/s of reading them until the first token is drawn, `tokens`
            written after that, and tokens/s of writing.
        """
        event, run = self._make(1), self._run
        half = run.settings.model.context // 2
        prompt = run.tokenizer.decode(event.data.batch.tokens[0, :half].tolist())
        autocast = torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None)
        reading, writing, written = [], [], 0
        with evaluating(run.layout), autocast:
            lm = LanguageModel(run.layout.model, run.tokenizer)
            read = 1 + len(run.tokenizer.encode(prompt))
            for repeat in range(1 + REPEATS):
                pieces = lm.stream(prompt, max_tokens=WRITTEN, temperature=0, stop_at_eos=False)
                first = _timed(partial(next, pieces))
                start = time.perf_counter()
                written = sum(1 for _ in pieces) - 1  # the last piece is the text's end
                if repeat:  # not the first, which finds nothing ready
                    reading.append(read / first)
                    writing.append(written / (time.perf_counter() - start))
        return {
            "prompt_tokens": read,
            "prompt_tokens_per_second": spread(reading),
            "tokens": written,
            "tokens_per_second": spread(writing),
        }

    def close(self) -> None:
        """End the loader and give up what is being saved."""
        self._gear.loader.close()
        self._gear.saver.close()

    def _warm_up(self) -> None:
        if not self._warm:
            self._make(WARM_UP)
            self._warm = True

    def _make(self, steps: int) -> Event:
        for event in islice(self._steps, steps):
            self._event = event
        assert self._event is not None
        return self._event


def _timed(act: Callable[[], Any]) -> float:
    """Give the seconds that something takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
