"""What a run's checkpoints hold, what they belong to, and which of them stay.

Flow: `pretrain` makes one saver for each start of a run; its saves are hooks of the loop.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from summerlm.checkpoint.flight import Outcome
from summerlm.checkpoint.store import Retention
from summerlm.core.config import dump_toml
from summerlm.core.files import sha256_file
from summerlm.core.record import Recorder
from summerlm.data.ledger import Ledger
from summerlm.recipes.data.locking import lock_path
from summerlm.recipes.opening import Run
from summerlm.recipes.settings import Settings, derive
from summerlm.train.guards import Guard
from summerlm.train.saving import Saver


def make_saver(
    run: Run,
    recorder: Recorder,
    guard: Guard,
    ledger: Ledger,
    states: Mapping[str, Callable[[], Any]],
) -> Saver:
    """Make what saves a run; every rank calls this.

    Args:
        run: The run.
        recorder: Told of saves, and of those that fail.
        guard: Saved with the run.
        ledger: Saved with the run.
        states: What gives further parts of the state, by name.

    Returns:
        The saver.
    """
    settings = run.settings
    config = dump_toml(settings).encode()

    def announce(outcome: Outcome) -> None:
        recorder.write(
            "save",
            line=f"step {outcome.step}: saved in {outcome.seconds:.2f} s, "
            f"for which training stood still {outcome.stall_s:.3f} s",
            step=outcome.step,
            stall_s=outcome.stall_s,
            seconds=outcome.seconds,
            bytes=outcome.bytes,
        )

    return Saver(
        run.store,
        run.ranks,
        run.tables,
        states={"guard": guard.state, "ledger": ledger.state, **states},
        files={
            "config.toml": config,
            "model.json": settings.model.model_dump_json().encode(),
            "tokenizer.json": (run.folder.path / "tokenizer.json").read_bytes(),
        },
        identity={
            "tokenizer": run.tokenizer.fingerprint,
            "settings": hashlib.sha256(config).hexdigest(),
            "data": sha256_file(lock_path(settings)),
        },
        retention=retention(settings),
        warn=lambda line: recorder.write("incident", line=f"warning: {line}", reason=line),
        saved=announce,
    )


def retention(settings: Settings, keep_last: int | None = None) -> Retention:
    """Tell which checkpoints of a run stay.

    Args:
        settings: The run's settings.
        keep_last: How many of the newest stay; None = as the settings say.

    Returns:
        The rule: those, every n-th, and the one that a longer run can start from.
    """
    stable = derive(settings).stable_steps
    return Retention(
        settings.checkpoint.keep_last if keep_last is None else keep_last,
        settings.checkpoint.keep_every_steps,
        frozenset(() if stable is None else (stable,)),
    )
