"""Pretraining: from settings to a finished run folder.

Flow:
    1. `pretrain` takes the run folder; a finished run is left as it is;
    2. `open_run` brings the run to where its next step can be made;
    3. `run_steps` iterates over the loop with its hooks: count, record, validate, sample, save;
    4. a signal saves and leaves; at the end the run is saved and its ledger written.
"""

import hashlib

from rich.console import Console

from summerlm.checkpoint.store import Retention
from summerlm.core.config import dump_toml
from summerlm.core.errors import DataChangedError, SourceDownError, UsageError, WorkerDiedError
from summerlm.core.files import RunFolder, sha256_file
from summerlm.core.ranks import ALONE
from summerlm.core.record import Recorder
from summerlm.core.runtime import InterruptedWaitError, StopRequest, require_single_process
from summerlm.data.ledger import Ledger
from summerlm.optim.schedule import rate_factor
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.opening import Run, is_finished, open_run, tables
from summerlm.recipes.recording import Record, describe_run, open_recorder, seconds_spent
from summerlm.recipes.settings import Settings, derive
from summerlm.recipes.watching import Watch
from summerlm.train.guards import SkipGuard
from summerlm.train.hooks import Hook, every
from summerlm.train.loop import Event, train
from summerlm.train.saving import Saver
from summerlm.train.step import Stepper

# what a loader may meet in the middle of a run: the steps that are made are saved first
OF_THE_DATA = (DataChangedError, SourceDownError, UsageError, WorkerDiedError)


def pretrain(settings: Settings, console: Console) -> int:
    """Train a run to the end of its budget, from wherever its folder stands.

    Args:
        settings: The run's settings.
        console: Where a person reads along.

    Returns:
        The exit code: 0 when finished or stopped and saved, 75 after SIGUSR1.
    """
    require_single_process()
    if is_finished(settings):
        console.print(f"{settings.run.folder}: finished already; nothing to do", soft_wrap=True)
        return 0
    with RunFolder(settings.run.folder) as folder, StopRequest() as stop:
        notes: list[str] = []
        try:
            run = open_run(settings, folder, notes.append, stop)
        except InterruptedWaitError:
            console.print("stopped while the data were opened", soft_wrap=True)
            return stop.exit_code
        describe_run(console, settings, run.model, run.optimizer, run.device, run.dtype)
        recorder = open_recorder(settings, folder, console, run.state, run.resumed)
        for note in notes:
            recorder.write("incident", line=f"warning: {note}", reason=note)
        try:
            finished = run_steps(run, recorder, stop)
        except InterruptedWaitError:
            recorder.write("stop", line="stopped before a step was made")
            finished = False
        finally:
            recorder.close()
    return 0 if finished else stop.exit_code


def run_steps(run: Run, recorder: Recorder, stop: StopRequest) -> bool:
    """Make the remaining steps, with everything that hangs on them.

    Args:
        run: The run.
        recorder: Where its events go.
        stop: Asked after each step whether to save and leave.

    Returns:
        Whether the last step is made, not only saved on request.

    Raises:
        SaveError: If the last state can't be saved.
        SourceDownError: If a source fails for good; the last step is saved before.
        WorkerDiedError: If a data worker was killed; the last step is saved before.
    """
    settings, derived, state = run.settings, derive(run.settings), run.state or {}
    guard = SkipGuard(settings.train.max_skipped_steps, state.get("guard"))
    ledger = Ledger([source.name for source in run.sources], state.get("ledger"))
    saver = make_saver(run, recorder, guard, ledger)
    with stop.interrupting():  # held-out texts are read, and a state of tokens is dealt again
        watch = Watch(
            run.model, run.tokenizer, settings, run.sources, dtype=run.dtype, recorder=recorder
        )
        loader = open_loader(settings, run.sources, run.tokenizer, state.get("data"))
    last = derived.steps
    hooks: list[Hook] = [
        lambda event: ledger.add(event.data.source_counts),
        lambda event: record_incidents(recorder, event),
        lambda event: saver.poll([saver.report()]),
        Record(recorder, settings, run.device, seconds_spent(run.folder)),
        every(settings.validation.every_steps, watch.validate, last_step=last),
        every(settings.samples.every_steps, watch.sample, last_step=last),
        every(settings.checkpoint.every_steps, saver.save, last_step=derived.stable_steps),
    ]
    event = None
    try:
        for event in train(
            make_stepper(run),
            loader,
            lambda tokens: rate_factor(settings.optim, tokens, derived.tokens),
            guard,
            start_tokens=state.get("tokens", 0),
            last_step=last,
            sources=[source.name for source in run.sources],
            device=run.device,
            stop=stop,
        ):
            for hook in hooks:
                hook(event)
            if event.step == last:
                saver.save(event)
                saver.finish()
            if stop.received is not None and event.step < last:
                saver.save(event)
                saver.finish()
                line = f"{stop.received.name}: saved after step {event.step}, leaving"
                recorder.write("stop", line=line, step=event.step)
                break
    except OF_THE_DATA as error:
        recorder.write("incident", line=f"warning: {error}", reason=str(error))
        if event is not None:
            saver.save(event)
            saver.finish()
            run.folder.write_json("ledger.json", ledger.report())
        raise
    finally:
        loader.close()
        saver.close()
    run.folder.write_json("ledger.json", ledger.report())
    return event is not None and event.step == last


def make_saver(run: Run, recorder: Recorder, guard: SkipGuard, ledger: Ledger) -> Saver:
    """Make what saves a run.

    Args:
        run: The run.
        recorder: Told of saves that fail.
        guard: Saved with the run.
        ledger: Saved with the run.

    Returns:
        The saver.
    """
    settings = run.settings
    config = dump_toml(settings).encode()
    stable = derive(settings).stable_steps
    lock = run.folder.path / "data.lock.json"
    return Saver(
        run.store,
        ALONE,
        tables(run.model, run.optimizer),
        states={"guard": guard.state, "ledger": ledger.state},
        files={
            "config.toml": config,
            "model.json": settings.model.model_dump_json().encode(),
            "tokenizer.json": (run.folder.path / "tokenizer.json").read_bytes(),
        },
        identity={
            "tokenizer": run.tokenizer.fingerprint,
            "settings": hashlib.sha256(config).hexdigest(),
            **({"data": sha256_file(lock)} if lock.exists() else {}),
        },
        retention=Retention(
            settings.checkpoint.keep_last,
            settings.checkpoint.keep_every_steps,
            frozenset(() if stable is None else (stable,)),
        ),
        warn=lambda line: recorder.write("incident", line=f"warning: {line}", reason=line),
        saved=lambda outcome: None,
    )


def record_incidents(recorder: Recorder, event: Event) -> None:
    """Record what the data met and mended while a step's batch was made.

    Args:
        recorder: Where it goes.
        event: The step.
    """
    for incident in event.data.incidents:
        reason = incident["reason"]
        recorder.write("incident", line=f"warning: {reason}", step=event.step, reason=reason)


def make_stepper(run: Run) -> Stepper:
    """Make the function of one step of a run."""
    return Stepper(
        run.layout,
        run.optimizer,
        run.settings.train,
        ALONE,
        seed=run.settings.run.seed,
        dtype=run.dtype,
        micro_rows=run.settings.parallel.micro_batch_rows,
        sources=len(run.sources),
    )
