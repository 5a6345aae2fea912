"""What a run does about a spike: find its documents, leave them out, and go back.

Flow: `pretrain` hangs a `Spikes` on the loop. The device has made no update of a step beyond the
guard's limits, whatever the policy. Under "rollback" the hook names the documents of the rows that
the spike came of, quarantines these rows and all later ones with pieces of the same documents, and
raises `Rollback`, upon which `pretrain` goes on from the newest checkpoint.
"""

from typing import Any

from summerlm.core.record import Recorder
from summerlm.data.loader import Loader, Steps, merge_states
from summerlm.data.naming import Followed, follow
from summerlm.data.tokens.following import follow_tokens
from summerlm.data.tokens.reading import Tokens
from summerlm.recipes.opening import Run
from summerlm.recipes.settings import derive
from summerlm.train.guards import Verdict
from summerlm.train.loop import Event
from summerlm.train.quarantine import Quarantine, Rollback, offending
from summerlm.train.saving import Saver


class Spikes:
    """Watches for spikes in one start of a run; every rank has one.

    Args:
        run: The run.
        loader: Its data, whose documents are to be named.
        saver: Its saver, whose save in flight may be what the run goes back to.
        recorder: Told what is done.

    Attributes:
        quarantine: The rows that are left out.
    """

    def __init__(self, run: Run, loader: Steps, saver: Saver, recorder: Recorder) -> None:
        self._run, self._loader, self._saver, self._recorder = run, loader, saver, recorder
        self.quarantine = Quarantine(run.folder.path / "quarantine.json", run.ranks)
        self._data: dict[str, Any] | None = None  # of this rank, after the step before

    def __call__(self, event: Event) -> None:
        """Look at one step.

        Args:
            event: The step.

        Raises:
            Rollback: If it spiked and the run is to go back.
            DivergedError: If the run went back too often already.
        """
        if event.verdict is Verdict.SPIKE and self._run.settings.train.on_spike == "rollback":
            self._go_back(event)
        self._data = event.data.state

    def _go_back(self, event: Event) -> None:
        ranks = self._run.ranks
        self._saver.settle(event)  # a save in flight may be what the run goes back to
        if not ranks.lead(self._run.store.steps):
            self._incident(event, "no checkpoint to go back to yet: the step is skipped")
            return
        said = ranks.exchange((event.result.row_nats.tolist(), event.result.row_targets.tolist()))
        nats, targets = zip(*said, strict=True)
        rows = offending(nats, targets, event.limits.loss)
        ranks.phase("open", event.step)  # naming and reopening read as much as a start does
        followed = self._follow(event.step, rows)
        ranks.agree(lambda: self.quarantine.add(followed.rows))
        reason = (
            f"going back to the last checkpoint; {len(followed.rows)} rows of "
            f"{len(followed.documents)} documents are left out from now on"
        )
        self._recorder.write(
            "incident",
            line=f"warning: step {event.step}: {reason}",
            step=event.step,
            reason=reason,
            rows=followed.rows,
            documents=[name._asdict() for name in followed.documents],
        )
        raise Rollback(event.step, rows)

    def _follow(self, step: int, rows: list[int]) -> Followed:
        """Name the rows' documents and find where they go on; every rank gets the same."""
        run, loader = self._run, self._loader
        last = derive(run.settings).steps
        if isinstance(run.sources, Tokens):  # tokens don't say which documents they are of
            tokens, bos = run.sources, run.tokenizer.bos
            return run.ranks.lead(lambda: follow_tokens(tokens, bos, step, rows, last))
        assert isinstance(loader, Loader), "sources are dealt by a loader"
        order, state = loader.order, run.state_of_data
        if self._data is not None:
            state = merge_states(run.ranks.exchange(self._data))
        lanes = state["lanes"] if state else {}
        return run.ranks.lead(lambda: follow(order, lanes, step, rows, last))

    def _incident(self, event: Event, reason: str) -> None:
        line = f"warning: step {event.step}: {reason}"
        self._recorder.write("incident", line=line, step=event.step, reason=reason)
