"""The soak's runs: their settings, how they lie over ranks, how they are started.

Flow: `soak.py` makes a `Bed` and of each `Lie` a twin, an uninterrupted run; `soak_course.py`
starts the others.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from watched_job import Job, Row, command

from summerlm.recipes.demo import training_texts
from summerlm.tokenizer.learn import learn_bpe

LANES, BATCH, CONTEXT, VOCABULARY = 8, 512, 64, 512
SAVE_EVERY = 7
TOLERANCE = 1e-5  # of losses, where the layout changed
END_S = 240  # how long a run may take without a fault; the machine may be busy

TOY = f"""
[tokenizer]
name = "FOLDER/tokenizer"

[model]
vocabulary = {VOCABULARY}
width = 64
layers = 2
heads = 4
kv_heads = 2
head_dim = 16
mlp_hidden = 90  # no number of ranks beyond 2 divides its rows evenly
context = {CONTEXT}

[optim]
name = "muon"
newton_schulz_dtype = "float32"
peak_lr = 0.005
adam_lr = 0.003
warmup_tokens = 5120

[data]
lanes = {LANES}
workers = 0

[data.sources.library]
python_stdlib = true
weight = 1
licence = "PSF-2.0"

[train]
batch_tokens = {BATCH}
budget_tokens = BUDGET
precision = "float32"

[checkpoint]
every_steps = {SAVE_EVERY}
keep_last = 3

[validation]
every_steps = 50
characters_per_source = 2000

[run]
device = "cpu"
log_every_steps = 20

[parallel]
timeout_s = 20
"""


@dataclass(frozen=True)
class Lie:
    """How a run lies over ranks.

    Args:
        world: Ranks.
        shards: Ranks that share one copy of the weights.
    """

    world: int
    shards: int

    def __str__(self) -> str:
        kind = {1: "replicated", self.world: "sharded"}.get(self.shards, "hybrid")
        return f"{self.world} ranks, {kind}" if self.world > 1 else "1 rank"


def lies(world: int) -> list[Lie]:
    """List the ways to lay a run over so many ranks."""
    return [Lie(world, shards) for shards in range(1, world + 1) if world % shards == 0]


class Bed:
    """The folder that a soak's runs share: settings, tokenizer, cache.

    Args:
        folder: An empty one.
        steps: Of each run.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.config = folder / "toy.toml"
        toy = TOY.replace("FOLDER", str(folder)).replace("BUDGET", str(steps * BATCH))
        self.config.write_text(toy)

    def learn_tokenizer(self) -> None:
        """Make what all runs read."""
        texts = itertools.islice(training_texts(), 40)
        learn_bpe(texts, VOCABULARY).save(self.folder / "tokenizer")

    def start(
        self,
        name: str,
        lie: Lie,
        launcher: str = "summerlm",
        *,
        max_restarts: int = 0,
        failpoint: str = "",
        workers: int = 0,
        heed: Callable[[Row], object] = lambda _: None,
    ) -> Job:
        """Start or go on with a run.

        Args:
            name: Of its folder.
            lie: How it lies over ranks this time.
            launcher: See `watched_job.command`.
            max_restarts: How often the launcher starts ranks again.
            failpoint: What `SUMMERLM_FAILPOINT` is set to.
            workers: Data workers of a rank.
            heed: Called with each new row of its record.

        Returns:
            The job.
        """
        run = self.folder / name
        words = command(self.config, lie.world, launcher, max_restarts)
        words += [f"run.folder={run}", f"parallel.shard_ranks={lie.shards}"]
        words += [f"data.workers={workers}"]
        environment = {
            "OMP_NUM_THREADS": "1",  # sums of a rank alone depend on its threads
            "SUMMERLM_CACHE": str(self.folder / "cache"),
            "SUMMERLM_FAILPOINT": failpoint,
        }
        return Job(words, run, self.folder / f"{name}.log", environment, heed)

    def make_twin(self, lie: Lie) -> str:
        """Train an uninterrupted run.

        Args:
            lie: How it lies over ranks.

        Returns:
            The name of its folder.

        Raises:
            SystemExit: If it fails: nothing can be compared then.
        """
        name = f"twin-{lie.world}-{lie.shards}"
        with self.start(name, lie) as job:
            job.wait(lambda: job.code is not None, END_S)
            if job.code != 0:
                raise SystemExit(f"the twin on {lie} ended with {job.code}:\n{job.words}")
        return name

    def finished(self, name: str) -> bool:
        """Tell whether a run's last checkpoint is there."""
        return self.checkpoints(name)[-1:] == [self.steps]

    def checkpoints(self, name: str) -> list[int]:
        """List the steps of a run's published checkpoints."""
        folders = (self.folder / name / "checkpoints").glob("step-*")
        return sorted(int(folder.name.removeprefix("step-")) for folder in folders)

    def checkpoint(self, name: str, step: int) -> Path:
        """Name the folder of one of them."""
        return self.folder / name / "checkpoints" / f"step-{step:08d}"
