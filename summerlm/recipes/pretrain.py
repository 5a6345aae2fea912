"""Pretraining: from settings to a finished run folder, on one device or many.

Flow:
    1. `pretrain` joins its job and takes the run folder; a finished run is left as it is;
    2. `open_run` brings the run to where its next step can be made;
    3. `run_steps` iterates over the loop with its hooks: count, record, measure, sample, save;
    4. a signal to any rank saves and leaves; a spike may go back to a checkpoint and on from there;
    5. at the end the run is saved and its ledger written.
Every rank does all of this; the leading one holds the folder, records and speaks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from rich.console import Console

from summerlm.core.errors import (
    DataChangedError,
    DivergedError,
    SaveError,
    SourceDownError,
    UsageError,
    WorkerDiedError,
)
from summerlm.core.files import RunFolder
from summerlm.core.hardware import device_type
from summerlm.core.ranks import Ranks, join
from summerlm.core.record import Recorder
from summerlm.core.runtime import InterruptedWaitError, StopRequest
from summerlm.data.ledger import Ledger
from summerlm.data.loader import Steps, refuse_world
from summerlm.optim.schedule import rate_factor
from summerlm.recipes.assembling import make_stepper
from summerlm.recipes.best import Best
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.opening import Run, is_finished, open_run
from summerlm.recipes.profiling import profiled_run
from summerlm.recipes.recording import (
    Record,
    describe_run,
    open_recorder,
    record_incidents,
    seconds_spent,
    write_ledger,
)
from summerlm.recipes.settings import Settings, derive
from summerlm.recipes.spikes import Spikes
from summerlm.recipes.storing import make_saver
from summerlm.recipes.suites import Rounds
from summerlm.recipes.watching import Watch
from summerlm.train.feed import Feed
from summerlm.train.guards import Guard
from summerlm.train.hooks import Hook, every
from summerlm.train.loop import Event, Stretch, train
from summerlm.train.quarantine import Rollback
from summerlm.train.saving import Saver

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
    device, limit = device_type(settings.run.device), settings.parallel.timeout_s
    # the loader gives up by itself, with better words, after one deadline and what hangs behind it
    patience = 2 * settings.data.deadline_s + 4 * settings.data.stall_timeout_s
    with StopRequest() as stop, join(device, limit, patience) as ranks:
        if settings.data.lanes % ranks.world:
            raise refuse_world(ranks.world, settings.data.lanes)
        voice = console if ranks.leads else Console(quiet=True)
        stop.say = lambda line: voice.print(line, soft_wrap=True)
        if ranks.lead(lambda: is_finished(settings)):
            voice.print(f"{settings.run.folder}: finished already; nothing to do", soft_wrap=True)
            return 0
        with ExitStack() as held:
            folder = RunFolder(settings.run.folder)
            ranks.agree(lambda: held.enter_context(folder) if ranks.leads else folder)
            return train_run(settings, folder, ranks, voice, stop)


def train_run(
    settings: Settings, folder: RunFolder, ranks: Ranks, console: Console, stop: StopRequest
) -> int:
    """Open a run and make its remaining steps, going back where a spike asks for it.

    Args:
        settings: The run's settings.
        folder: Its folder, held by the leading rank.
        ranks: This process among those that train it.
        console: Where a person reads along.
        stop: A request to stop.

    Returns:
        The exit code: 0 when finished or stopped and saved, 75 after SIGUSR1, 130 where a Ctrl-C
        came before a step was made.
    """
    notes: list[str] = []
    console.print(f"{folder.path}: opening the data and the model ...", soft_wrap=True)
    try:
        run = open_run(settings, folder, ranks, notes.append, stop)
    except InterruptedWaitError:
        console.print("interrupted before the run began: nothing to save", soft_wrap=True)
        return stop.exit_code_without_a_step
    if ranks.leads:
        describe_run(console, run)
    while True:
        recorder = open_recorder(run, console)
        for note in notes:
            recorder.write("incident", line=f"warning: {note}", reason=note)
        try:
            return 0 if run_steps(run, recorder, stop) else stop.exit_code
        except InterruptedWaitError:
            recorder.write("stop", line="interrupted before a step was made: nothing to save")
            return stop.exit_code_without_a_step
        except Rollback as spike:
            notes[:] = [str(spike)]  # the list that the run's store warns into
        finally:
            recorder.close()
        run = run.go_back()


@dataclass(frozen=True)
class Equipment:
    """What one start of a run has beside the run itself."""

    guard: Guard
    ledger: Ledger
    saver: Saver
    spikes: Spikes
    watch: Watch
    best: Best
    rounds: Rounds
    loader: Steps


def run_steps(run: Run, recorder: Recorder, stop: StopRequest) -> bool:
    """Make the remaining steps, with everything that hangs on them.

    Args:
        run: The run.
        recorder: Where its events go.
        stop: A request to stop after a step.

    Returns:
        Whether the last step is made, not only saved on request.

    Raises:
        SaveError: If the last state can't be saved.
        SourceDownError: If a source fails for good; the last step is saved before.
        WorkerDiedError: If a data worker was killed; the last step is saved before.
        DivergedError: If the guard stops the run; a save that is on its way is finished before.
        Rollback: If a spike asks to go on from the checkpoint before it.
    """
    gear = equip(run, recorder, stop)
    saver, last = gear.saver, derive(run.settings).steps
    hooks = make_hooks(run, recorder, gear)
    event = None
    try:
        for event in profiled_run(make_steps(run, gear, stop), run, recorder):
            for hook in hooks:
                hook(event)
            asked = stop.received if run.ranks.world == 1 else event.stop
            if event.step == last or asked is not None:
                write_ledger(run, gear.ledger)  # before a kill may meet a run that is finished
                saver.save(event)
                saver.finish()
            if asked is not None and event.step < last:
                line = f"{asked.name}: saved after step {event.step}, leaving"
                recorder.write("stop", line=line, step=event.step)
                break
    except OF_THE_DATA as error:
        recorder.write("incident", line=f"warning: {error}", reason=str(error))
        if event is not None:
            write_ledger(run, gear.ledger)
            saver.save(event)
            saver.finish()
        raise
    except DivergedError:  # on all ranks at once: what is being saved was good, so it stays
        with suppress(SaveError):
            saver.finish()
        raise
    finally:
        gear.loader.close()
        saver.close()
    return event is not None and event.step == last


def equip(run: Run, recorder: Recorder, stop: StopRequest) -> Equipment:
    """Make what one start of a run needs beside the run itself; every rank calls this.

    Args:
        run: The run.
        recorder: Told of saves that fail, and of spikes.
        stop: Ends a wait for data.

    Returns:
        It, with the data open at the run's next step.
    """
    settings, state, ranks = run.settings, run.state or {}, run.ranks
    guard = Guard(settings.train, state.get("guard"))
    ledger = Ledger([source.name for source in run.sources], state.get("ledger"))
    best = Best(run)
    saver = make_saver(run, recorder, guard, ledger, best.states)
    rounds = Rounds(run, recorder, stop, saver.settle, best.see)

    def open_data() -> tuple[Watch, Steps]:
        with stop.interrupting():  # held-out texts are read, and a state of tokens is dealt again
            watch = Watch(run, recorder, best.see)
            return watch, open_loader(
                settings,
                run.sources,
                run.tokenizer,
                run.state_of_data,
                rank=ranks.rank,
                world=ranks.world,
            )

    watch, loader = ranks.agree(open_data)
    spikes = Spikes(run, loader, saver, recorder)
    return Equipment(guard, ledger, saver, spikes, watch, best, rounds, loader)


def make_hooks(run: Run, recorder: Recorder, gear: Equipment) -> list[Hook]:
    """List what happens after the steps, in order.

    Args:
        run: The run.
        recorder: Where its events go.
        gear: What hangs on it.

    Returns:
        The hooks.
    """
    settings, derived, watch = run.settings, derive(run.settings), gear.watch
    last, saver = derived.steps, gear.saver
    return [
        *hooks_of_each_step(run, recorder, gear),
        every(settings.validation.every_steps, saver.settle, last_step=last),
        every(settings.validation.every_steps, watch.validate, last_step=last),
        every(settings.samples.every_steps, watch.sample, last_step=last),
        gear.rounds,
        gear.best.when_new(saver.save),
        every(settings.checkpoint.every_steps, saver.save, last_step=derived.stable_steps),
    ]


def hooks_of_each_step(run: Run, recorder: Recorder, gear: Equipment) -> list[Hook]:
    """List what happens after every step, in order.

    Args:
        run: The run.
        recorder: Where its events go.
        gear: What hangs on it.

    Returns:
        The hooks.
    """
    return [
        lambda event: gear.ledger.add(event.data.source_counts),
        lambda event: record_incidents(recorder, event),
        lambda event: gear.saver.poll(event.data.reports),
        Record(recorder, run, seconds_spent(run.folder)),
        gear.spikes,
        lambda event: gear.guard.check(event.step),  # before a save that a restart would go on from
    ]


def make_steps(run: Run, gear: Equipment, stop: StopRequest) -> Iterator[Event]:
    """Begin the loop of a run.

    Args:
        run: The run.
        gear: What hangs on it.
        stop: A request to stop.

    Returns:
        The steps, as they are completed.
    """
    settings, derived, state = run.settings, derive(run.settings), run.state or {}
    mask, report = gear.spikes.quarantine.mask, gear.saver.report
    sources, release = len(run.sources), gear.saver.release
    return train(
        make_stepper(settings, run.layout, run.optimizer, run.dtype, sources, release),
        Feed(gear.loader, run.ranks, run.device, stop, mask, report),
        lambda tokens: rate_factor(settings.optim, tokens, derived.tokens),
        gear.guard,
        stretch=Stretch(state.get("step", 0), state.get("tokens", 0), derived.steps),
        sources=[source.name for source in run.sources],
        ranks=run.ranks,
        stop=stop,
    )
