"""How a comparison is made: each side's best mode is searched, then both make steps in turn.

Flow: `peers.py` gives a `Contestant` for each side; `search` tries its modes, each in a process of
its own; `compete` starts the winners together and asks them for slices, A-B-A-B.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from child import Child

from summerlm.core.figures import spread
from summerlm.core.runtime import SPINS

# what the product's command sets, and what a program finds that sets nothing
OURS = f"GOMP_SPINCOUNT={SPINS}"
ENVIRONMENTS = ("default", OURS)


def variables(environment: str) -> dict[str, str]:
    """Give what an environment sets; ValueError if it is neither "default" nor NAME=VALUE."""
    if environment == "default":
        return {}
    name, equals, value = environment.partition("=")
    if not (name and equals):
        raise ValueError(f"environment {environment!r}: write default, or NAME=VALUE")
    return {name: value}


@dataclass(frozen=True)
class Mode:
    """How a side runs.

    Attributes:
        compiled: Whether torch.compile is used.
        dtype: Of matmuls: "bfloat16" under autocast, or "float32".
        micro_rows: Rows that go through the model at once.
        environment: "default", or a variable as NAME=VALUE.
    """

    compiled: bool
    dtype: str
    micro_rows: int
    environment: str = "default"

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{how}, {self.dtype}, {self.micro_rows} rows at once, {self.environment}"


@dataclass(frozen=True)
class Contestant:
    """One side.

    Attributes:
        name: For people.
        job: What `peers_side` is given, without the mode.
        tokens: Tokens of its step.
    """

    name: str
    job: dict[str, Any]
    tokens: int

    def start(self, mode: Mode, warm: int) -> Child:
        """Start the side's process; its first answer comes when it is warm."""
        job = {**self.job, **asdict(mode), "warm": warm}
        side = Path(__file__).with_name("peers_side.py")
        command = [sys.executable, str(side), json.dumps(job)]
        return Child(command, environment=variables(mode.environment))


@dataclass(frozen=True)
class Amounts:
    """How much is measured.

    Attributes:
        tried: Steps a mode is tried with.
        warm: Steps that are made and forgotten, compilation among them.
        steps: Steps that each side is measured with.
        slice: Steps that a side makes before it is the other's turn.
    """

    tried: int = 9
    warm: int = 3
    steps: int = 40
    slice: int = 2


class Search:
    """Looks for the mode in which a side is fastest.

    Args:
        contestant: The side.
        amounts: How much is measured.
    """

    def __init__(self, contestant: Contestant, amounts: Amounts) -> None:
        self._contestant, self._amounts = contestant, amounts
        self.tried: list[dict[str, Any]] = []
        self._rates: dict[Mode, float] = {}

    def best(
        self,
        modes: Sequence[tuple[bool, str]],
        micro_rows: Sequence[int],
        environments: Sequence[str],
    ) -> Mode:
        """Try modes, then micro-batches in the best of them, then environments.

        Args:
            modes: (compiled, dtype) of each.
            micro_rows: Micro-batches, the largest first.
            environments: Each "default", or a variable as NAME=VALUE.

        Returns:
            The fastest mode. Where there is nothing to choose from, nothing is run.

        Raises:
            SystemExit: If no mode fits into memory.
        """
        starts = [Mode(*mode, micro_rows[0], environments[0]) for mode in modes]
        if len(starts) == len(micro_rows) == len(environments) == 1:
            return starts[0]
        for start in starts:
            for rows in micro_rows:  # the largest that fits
                if self._try(replace(start, micro_rows=rows)):
                    break
        if not self._rates:
            raise SystemExit(f"{self._contestant.name}: no mode fits into memory")
        for rows in micro_rows:
            self._try(replace(self._fastest(), micro_rows=rows))
        for environment in environments:
            self._try(replace(self._fastest(), environment=environment))
        return self._fastest()

    def _fastest(self) -> Mode:
        return max(self._rates, key=lambda mode: self._rates[mode])

    def _try(self, mode: Mode) -> bool:
        """Measure a mode that wasn't tried yet; gives whether it fits into memory."""
        if any(row["mode"] == asdict(mode) for row in self.tried):
            return mode in self._rates
        with self._contestant.start(mode, self._amounts.warm) as child:
            rate = None
            if "out_of_memory" not in child.answer():
                seconds = child.answer(self._amounts.tried)["seconds"]
                rate = self._contestant.tokens / statistics.median(seconds)
                self._rates[mode] = rate
        self.tried.append({"mode": asdict(mode), "tokens_per_second": rate})
        told = "does not fit into memory" if rate is None else f"{rate:,.0f} tokens/s"
        print(f"  {self._contestant.name}: {mode}: {told}", file=sys.stderr, flush=True)
        return rate is not None


def compete(
    sides: Sequence[tuple[Contestant, Sequence[Mode]]], amounts: Amounts
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Let sides make steps in turn, all alive all the time.

    Args:
        sides: Each side with its modes; the first that fits into memory is taken.
        amounts: How much is measured.

    Returns:
        Figures by side, and for each turn the median seconds of a step by side.

    Raises:
        SystemExit: If a side doesn't fit into memory beside those before it.
    """
    turns: list[dict[str, float]] = []
    figures: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        children = {}
        for side, modes in sides:
            children[side.name], mode, about = _first_that_fits(stack, side, modes, amounts)
            figures[side.name], seconds[side.name] = {"mode": asdict(mode), **about}, []
        for start in range(0, amounts.steps, amounts.slice):
            turn = {}
            for name, child in children.items():
                answer = child.answer(min(amounts.slice, amounts.steps - start))
                seconds[name] += answer["seconds"]
                figures[name] |= {"loss": answer["loss"], "peak_bytes": answer["peak_bytes"]}
                turn[name] = statistics.median(answer["seconds"])
            turns.append(turn)
    for side, _ in sides:
        own = figures[side.name]
        own["seconds"] = spread(seconds[side.name])
        own["tokens_per_second"] = side.tokens / own["seconds"]["median"]
    return figures, turns


def _first_that_fits(
    stack: ExitStack, side: Contestant, modes: Sequence[Mode], amounts: Amounts
) -> tuple[Child, Mode, dict[str, Any]]:
    """Start a side in the first of its modes that fits; gives it, the mode, and what it says."""
    for mode in modes:
        child = side.start(mode, amounts.warm)
        with ExitStack() as own:
            own.enter_context(child)
            about = child.answer()
            if "out_of_memory" not in about:
                stack.push(own.pop_all())
                return child, mode, about
        print(f"  {side.name}: {mode}: does not fit into memory", file=sys.stderr, flush=True)
    raise SystemExit(f"{side.name}: fits into memory in no mode that may be taken")


def matmul_peak(device: str, dtype: str, size: int, repeats: int) -> float:
    """Measure what this machine multiplies with big square matrices.

    Args:
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
        size: Rows and columns.
        repeats: Products; the fastest counts, and some more come before.

    Returns:
        FLOP/s.
    """
    shape = dict.fromkeys(
        ("layers", "width", "heads", "kv_heads", "context", "rows", "vocabulary"), 1
    )
    job = {"side": "matmul", "device": device, "size": size, "shape": shape}
    contestant = Contestant("matmul", job, 1)
    with contestant.start(Mode(False, dtype, 1), warm=3) as child:
        flops: int = child.answer()["flops"]
        seconds: list[float] = child.answer(repeats)["seconds"]
    return flops / min(seconds)
