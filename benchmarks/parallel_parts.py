"""The parts of the benchmark `parallel.py`: which processes are asked for what.

Flow: `parallel.main` has a `Bench` measure each part; it starts children
(`parallel_side.py`) or the real command (`watched_job.py`), asks or waits, and sums up.
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import ONE_THREAD, Child, spread
from watched_job import Job, Row, command

from summerlm.core.config import read_settings
from summerlm.core.runtime import SPINS
from summerlm.recipes.demo import training_texts
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.learn import learn_bpe

HERE = Path(__file__).parent
PARTS = ("speed", "save", "restart")
LAYOUTS = ("replicated", "sharded")
ALONE = "one process"
BASE = [
    "train.batch_tokens=4096",
    "train.budget_tokens=1000000000000",
    "validation.characters_per_source=0",
    "checkpoint.keep_last=1",
]
# 28M parameters, most of them Muon's: 8 bytes each; steps small enough to make several meanwhile
LARGE = ["model.width=512", "model.layers=8", "model.mlp_hidden=1408", "model.heads=16"]
LARGE += ["model.kv_heads=16", "train.batch_tokens=512", "data.lanes=2"]
MOST_S = 300  # that a start may take


@dataclass(frozen=True)
class Amounts:
    """How much is measured.

    Args:
        slices: Slices that are timed, after one that isn't.
        steps: Steps of a slice.
        saves: Of each kind.
        meanwhile: Steps that are made beside a save, at least.
        starts: Of each kind.
        large: Settings of the model that is saved.
    """

    slices: int
    steps: int
    saves: int
    meanwhile: int
    starts: int
    large: Sequence[str]


FULL = Amounts(7, 8, 5, 4, 5, LARGE)
QUICK = Amounts(2, 2, 1, 2, 1, ())


class Bench:
    """One run of the benchmark.

    Args:
        config: File of the settings.
        overrides: Overrides of its settings.
        amounts: How much is measured.
        folder: An empty one for runs, tokenizer and cache.
    """

    def __init__(
        self, config: Path, overrides: Sequence[str], amounts: Amounts, folder: Path
    ) -> None:
        self._config, self._amounts, self._folder = config, amounts, folder
        tokenizer = f"tokenizer.name={folder / 'tokenizer'}"
        self._overrides = [tokenizer, *BASE, *overrides]
        self._settings = read_settings(Settings, config, self._overrides)
        texts = itertools.islice(training_texts(), 80)
        learn_bpe(texts, self._settings.model.vocabulary).save(folder / "tokenizer")

    def measure(self, part: str) -> dict[str, Any]:
        """Measure one of `PARTS`.

        Args:
            part: Its name.

        Returns:
            Its figures by name.
        """
        return {"speed": self._speed, "save": self._save, "restart": self._restart}[part]()

    def _speed(self) -> dict[str, Any]:
        """Time slices of all sides in turn; count what goes over the wire on the way."""
        half = self._settings.train.batch_tokens // 2
        lanes = max(1, self._settings.data.lanes // 2)
        with ExitStack() as open_:
            sides = {
                "one thread": [self._side(open_, "one")],
                "two threads": [self._side(open_, "two", threads=2)],
                "apart": [
                    self._side(open_, name, f"train.batch_tokens={half}", f"data.lanes={lanes}")
                    for name in ("left", "right")
                ],
                "replicated": [self._side(open_, "replicated", world=2)],
                "sharded": [self._side(open_, "sharded", "parallel.shard_ranks=all", world=2)],
            }
            rates: dict[str, list[float]] = {name: [] for name in sides}
            wire = {}
            for slice_ in range(1 + self._amounts.slices):
                for name, children in sides.items():
                    answers = ask(children, {"steps": self._amounts.steps})
                    if slice_:
                        tokens = sum(answer["tokens"] for answer in answers)
                        rates[name].append(tokens / max(answer["seconds"] for answer in answers))
                    if name in LAYOUTS:
                        wire[name] = on_the_wire(answers[0])
        pairs = [
            *((layout, "one thread") for layout in LAYOUTS),
            *((layout, "two threads") for layout in LAYOUTS),
            *((layout, "apart") for layout in LAYOUTS),
            ("apart", "one thread"),
        ]
        return {
            "speed": {name: spread(values) for name, values in rates.items()},
            "ratios": {
                f"{a} / {b}": spread([x / y for x, y in zip(rates[a], rates[b], strict=True)])
                for a, b in pairs
            },
            "wire": wire,
        }

    def _save(self) -> dict[str, Any]:
        """Save a large state, in turn on one process and on two ranks."""
        large = self._amounts.large
        with ExitStack() as open_:
            sides = {
                ALONE: self._side(open_, "save-one", *large, threads=2),
                "replicated": self._side(open_, "save-replicated", *large, world=2),
                "sharded": self._side(
                    open_, "save-sharded", *large, "parallel.shard_ranks=all", world=2
                ),
            }
            answers: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for repeat in range(1 + self._amounts.saves):
                for name, child in sides.items():
                    answer = child.answer(json.dumps({"save": self._amounts.meanwhile}))
                    if repeat:
                        answer["stall / synchronous"] = answer["stall"] / answer["synchronous"]
                        answers[name].append(answer)
        return {
            "save": {
                name: {key: spread([each[key] for each in repeats]) for key in repeats[0]}
                for name, repeats in answers.items()
            }
        }

    def _restart(self) -> dict[str, Any]:
        """Start the real command on runs that have a checkpoint, in turn."""
        kinds = {ALONE: 1, "replicated": 2, "sharded": 2}
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for repeat in range(1 + self._amounts.starts):
            for name, world in kinds.items():
                shards = world if name == "sharded" else 1
                taken = self._start(name, world, shards, "train" if repeat else "save")
                if repeat:
                    seconds[name].append(taken)
        return {"restart": {name: spread(values) for name, values in seconds.items()}}

    def _start(self, name: str, world: int, shards: int, kind: str) -> float:
        """Start a run's command and kill it at its first row of a kind; gives the seconds."""
        run = self._folder / f"restart-{name}"
        launcher = "summerlm" if world > 1 else "alone"
        words = [*command(self._config, world, launcher), *self._overrides]
        words += [f"run.folder={run}", f"parallel.shard_ranks={shards}", "checkpoint.every_steps=1"]
        words += ["run.device=cpu"]
        rows: list[Row] = []
        with Job(
            words, run, self._folder / "log.txt", self._environment(2 // world), rows.append
        ) as job:
            if not job.wait(lambda: any(row["kind"] == kind for row in rows), MOST_S):
                raise SystemExit(f"{name} does not start:\n{job.words}")
            return job.age()

    def _side(
        self, open_: ExitStack, name: str, *overrides: str, world: int = 1, threads: int = 1
    ) -> Child:
        own = [*self._overrides, *overrides, f"run.folder={self._folder / name}"]
        job = {"config": str(self._config), "overrides": own, "world": world}
        words = [sys.executable, str(HERE / "parallel_side.py"), json.dumps(job)]
        return open_.enter_context(Child(words, None, self._environment(threads)))

    def _environment(self, threads: int) -> dict[str, str]:
        return {
            **ONE_THREAD,
            "OMP_NUM_THREADS": str(threads),
            "GOMP_SPINCOUNT": SPINS,  # as the command sets it
            "SUMMERLM_CACHE": str(self._folder / "cache"),
        }


def ask(children: Sequence[Child], request: object) -> list[dict[str, Any]]:
    """Ask several children at once."""
    with ThreadPoolExecutor(len(children)) as pool:
        return list(pool.map(lambda child: child.answer(json.dumps(request)), children))


def on_the_wire(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Sum up what two ranks sent in a step, on average over both."""
    sent, least = answer["sent"], answer["least"]
    means = {kind: sum(each[kind] for each in sent) / len(sent) for kind in sent[0]}
    beyond = {"again": answer["again"], "added_up": answer["added_up"]}
    beyond["muon"] = sum(answer["muon"]) / len(sent)
    return {
        "sent": means,
        "least": least,
        "beyond": {**beyond, "rest": means["tensors"] - least - sum(beyond.values())},
        "tensors / least": means["tensors"] / least,
    }
