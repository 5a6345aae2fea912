"""The parts of the benchmark `data.py`: which processes are asked for what, and what that means.

Flow: `data.main` calls `Bench.measure` part by part; a part starts children (`data_ours.py`,
`data_peer.py`), asks them, and sums up.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import ONE_CORE, ONE_THREAD, Child, spread

from summerlm.core.config import read_settings
from summerlm.recipes.settings import Settings

HERE = Path(__file__).parent
PARTS = ("memory", "start", "stages", "chain", "peer", "workers")
STAGES = ("read", "tokenize", "pack")
ORIGINAL_KEEPS = 0.5  # of its blocks, with two workers a rank

Figures = dict[str, Any]  # JSON values


@dataclass(frozen=True)
class Amounts:
    """How much is measured.

    Args:
        starts: Fresh processes a kind of start.
        slices: Slices of a stream that are timed, after one that isn't.
        slice_tokens: Tokens of a slice, at least.
        stage_tokens: Tokens of each source that the stages work on, at least.
        steps: Steps of the memory's process, and before the late state.
        batches: Sizes of the peer's `map` batches to choose from.
    """

    starts: int
    slices: int
    slice_tokens: int
    stage_tokens: int
    steps: int
    batches: tuple[int, ...]


FULL = Amounts(3, 5, 3_000_000, 300_000, 60, (1, 16, 1000))
QUICK = Amounts(1, 2, 4_000, 2_000, 3, (1, 16))


class Bench:
    """One run of the benchmark.

    Args:
        config: File of the settings.
        overrides: Overrides of its settings.
        amounts: How much is measured.
        peer_python: The interpreter that has `datasets`.
        folder: Where caches and states go.
    """

    def __init__(
        self,
        config: Path,
        overrides: Sequence[str],
        amounts: Amounts,
        peer_python: str,
        folder: Path,
    ) -> None:
        self._config, self._overrides = config, overrides
        self._settings = settings = read_settings(Settings, config, overrides)
        self._amounts, self._peer_python, self._folder = amounts, peer_python, folder
        self._late, self._deep = folder / "late.json", folder / "deep.json"
        self._weights = {name: source.weight for name, source in settings.data.sources.items()}

    def measure(self, part: str) -> Figures:
        """Measure one of `PARTS`.

        Args:
            part: Its name.

        Returns:
            Its figures by name.
        """
        measures = {
            "memory": self._memory,
            "start": self._start,
            "stages": self._stages,
            "chain": self._chain,
            "peer": self._peer,
            "workers": self._workers,
        }
        return measures[part]()

    def _memory(self) -> Figures:
        with self._ours("memory", steps=self._amounts.steps, state=str(self._late)) as child:
            return {"memory": child.answer()}

    def _start(self) -> Figures:
        if not self._late.exists():
            self._memory()
        with self._ours("craft", state=str(self._deep)) as child:
            child.answer()
        kinds = {"cold": None, "warm": None, "late": self._late, "deep": self._deep}
        starts: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for repeat in range(self._amounts.starts):
            folder = self._folder / f"start{repeat}"  # no cache, no lock: the first kind makes them
            for kind, state in kinds.items():
                starts[kind].append(self._start_once(state, folder))
        seconds = {
            kind: {key: spread([each[key] for each in repeats]) for key in repeats[0]}
            for kind, repeats in starts.items()
        }
        return {"start": {"workers": self._settings.data.workers, "seconds": seconds}}

    def _start_once(self, state: Path | None, folder: Path) -> dict[str, float]:
        path, workers = state and str(state), self._settings.data.workers
        began = time.perf_counter()
        with self._ours("start", None, folder, state=path, workers=workers) as child:
            parts = child.answer()
            total = time.perf_counter() - began
        return {"total": total, "imports": total - sum(parts.values()), **parts}

    def _stages(self) -> Figures:
        with self._ours("stages", tokens=self._amounts.stage_tokens) as child:
            repeats = [child.answer("go") for _ in range(self._amounts.slices)]
        rates = [
            {
                source: {stage: figures["tokens"] / figures[stage] for stage in STAGES}
                for source, figures in repeat.items()
            }
            for repeat in repeats
        ]
        for repeat in rates:
            repeat["mixture"] = {stage: self._mixed(repeat, stage) for stage in STAGES}
        sample = {source: figures["tokens"] for source, figures in repeats[0].items()}
        summary = {
            row: {stage: spread([repeat[row][stage] for repeat in rates]) for stage in STAGES}
            for row in rates[0]
        }
        return {"stages": {"sample_tokens": sample, "tokens_per_second": summary}}

    def _mixed(self, rates: Mapping[str, Mapping[str, float]], stage: str) -> float:
        """Give the mixture's tokens/s from those of its sources."""
        seconds = (weight / rates[name][stage] for name, weight in self._weights.items())
        return sum(self._weights.values()) / sum(seconds)

    def _chain(self) -> Figures:
        with self._ours("chain", workers=0) as child:
            return {"chain": self._summary(*self._slices([child]))}

    def _peer(self) -> Figures:
        """Time slices of ours, the peer and the corrected peer in turn."""
        with self._ours("peer", tokenizer_folder=str(self._folder)) as child:
            job = child.answer()
        tried: dict[int, list[Figures]] = {}
        for batch in self._amounts.batches:
            with self._datasets(job, batch) as child:
                version = child.answer()["version"]
                tried[batch] = self._slices([child], 1)[0]
        rates = {
            batch: self._summary(slices)["tokens_per_second"] for batch, slices in tried.items()
        }
        best = max(rates, key=lambda batch: rates[batch]["median"])
        lengths = mean_lengths([each for slices in tried.values() for each in slices])
        corrected = {
            **job,
            "sources": [
                {**source, "weight": source["weight"] / lengths[source["name"]]}
                for source in job["sources"]
            ],
        }
        with (
            self._ours("chain", workers=0) as first,
            self._datasets(job, best) as second,
            self._datasets(corrected, best) as third,
        ):
            second.answer()
            third.answer()
            slices = self._slices([first, second, third])
        chain, peer, other = (self._summary(each) for each in slices)
        return {
            "chain": chain,
            "peer": {"datasets": version, "map_batch": best, "tried": rates, **peer},
            "corrected_peer": {"tokens_per_document": lengths, **other},
            "ratios": {
                "all tokens": _ratio(chain, peer, "tokens_per_second"),
                "useful tokens": _ratio(chain, peer, "useful_tokens_per_second"),
                "useful tokens, half of blocks lost": _ratio(
                    chain, peer, "useful_tokens_per_second", ORIGINAL_KEEPS
                ),
                "all tokens, corrected": _ratio(chain, other, "tokens_per_second"),
                "useful tokens, corrected": _ratio(chain, other, "useful_tokens_per_second"),
            },
        }

    def _workers(self) -> Figures:
        figures = {}
        for workers in (1, 2):
            with self._ours("chain", None, workers=workers) as child:
                figures[str(workers)] = self._summary(*self._slices([child]))
        return {"workers": figures}

    def _slices(self, children: Sequence[Child], count: int | None = None) -> list[list[Figures]]:
        """Ask children in turn for slices; the first of each isn't kept, it opens files."""
        rounds = [
            [child.answer(self._amounts.slice_tokens) for child in children]
            for _ in range(1 + (count or self._amounts.slices))
        ]
        return [list(answers) for answers in zip(*rounds[1:], strict=True)]

    def _summary(self, slices: Sequence[Figures]) -> Figures:
        """Sum up the slices of one stream; its shares, and so what is useful, are the whole's."""
        rates = [sum(each["tokens"].values()) / each["seconds"] for each in slices]
        tokens: Counter[str] = Counter()
        for each in slices:
            tokens.update(each["tokens"])
        useful = useful_share(tokens, self._weights)
        return {
            "tokens_per_second": spread(rates),
            "useful_tokens_per_second": spread([rate * useful for rate in rates]),
            "useful_share": useful,
            "shares": {name: tokens[name] / tokens.total() for name in self._weights},
        }

    def _ours(
        self, part: str, cores: set[int] | None = ONE_CORE, folder: Path | None = None, **job: Any
    ) -> Child:
        """Start a child of ours; with a cache and a run folder for the lock below `folder`."""
        folder = folder or self._folder
        job |= {
            "part": part,
            "config": str(self._config),
            "overrides": [*self._overrides, f"run.folder={folder / 'run'}"],
        }
        return Child(
            [sys.executable, str(HERE / "data_ours.py"), json.dumps(job)],
            cores,
            {**ONE_THREAD, "SUMMERLM_CACHE": str(folder / "cache")},
        )

    def _datasets(self, job: Figures, batch: int) -> Child:
        """Start the peer, on the same core."""
        return Child(
            [self._peer_python, str(HERE / "data_peer.py"), json.dumps({**job, "batch": batch})],
            ONE_CORE,
            {**ONE_THREAD, "HF_HOME": str(self._folder / "huggingface"), "HF_HUB_OFFLINE": "1"},
        )


def mean_lengths(slices: Sequence[Figures]) -> dict[str, float]:
    """Give the mean tokens of a document of each source that the slices met."""
    tokens: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for each in slices:
        tokens.update(each["tokens"])
        documents.update(each["documents"])
    return {name: tokens[name] / documents[name] for name in documents}


def useful_share(tokens: Mapping[str, int], weights: Mapping[str, float]) -> float:
    """Tell which part of a stream can be kept so that the kept tokens' shares are the weights.

    Args:
        tokens: Tokens of each source in the stream, at least one altogether.
        weights: The share asked for of each source; only ratios count.

    Returns:
        The largest such part of all tokens, 0 to 1.

    Example:
        >>> useful_share({"web": 60, "books": 140}, {"web": 3, "books": 1})
        0.4
    """
    kept = min(tokens.get(name, 0) / weight for name, weight in weights.items())
    return kept * sum(weights.values()) / sum(tokens.values())


def _ratio(ours: Figures, other: Figures, key: str, kept: float = 1.0) -> float | None:
    """Divide the medians of a figure, of which the other keeps a part; None for nothing kept."""
    divisor = other[key]["median"] * kept
    return ours[key]["median"] / divisor if divisor else None
