"""Whether all ranks of a job live and go on; if not, who is to blame, said once, and the end.

Flow: `ranks.join` starts a `Liveness`, a thread of each rank; the loop says by `Ranks.phase` what
it is about to do. Once a second each thread
    1. gives a sign of life to the job's store: step, phase, and how long it has stood there;
    2. looks whether a failure is claimed, or a peer on this machine is dead;
    3. where its own rank stands too long, or a peer gives no signs, asks `blame` who it is;
    4. ends the process if the job has failed and its main thread doesn't.
"""

import json
import os
import signal
import threading
import time
from dataclasses import asdict

import torch.distributed as dist

from summerlm.core.dumping import dump, listen, make_dump, send
from summerlm.core.errors import PeerLostError
from summerlm.core.failing import Claims, Failure, failure_of
from summerlm.core.roster import Peer, process_state
from summerlm.core.signs import NEVER, Sign, blame, position

PERIOD_S = 1.0
GRACE_S = 3.0  # what a rank has to end by itself, once the job has failed
OPENING = "open"  # the phase before the first step: it reads whole sources, and has no limit
LEFT = "left"  # the last: its process may end
GONE = ("Z", "X", "")  # what the kernel calls a process that has ended


class Liveness:
    """Watches a job from one of its ranks.

    Args:
        store: The job's store, for this thread alone; keys of this start of the job only.
        rank: This rank.
        peers: All ranks.
        timeout_s: Seconds a rank may stay in one phase, or give no sign of life.
        data_allowance_s: Seconds a rank may stay in the phase "data".
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        peers: list[Peer],
        *,
        timeout_s: float,
        data_allowance_s: float,
    ) -> None:
        self._store, self._claims = store, Claims(store)
        self._rank, self._peers, self._me = rank, peers, peers[rank]
        self._timeout_s = timeout_s
        self._allowance = {OPENING: None, "data": data_allowance_s}
        self._period_s = min(PERIOD_S, timeout_s / 5)
        self._main = threading.main_thread().ident
        self._place = (0, 1, OPENING, time.monotonic())  # replaced whole, so never read torn
        self._signs: dict[int, tuple[Sign, float]] = {}  # of each rank the last, and since when
        self._number = 0
        self._awake = time.monotonic()  # since when this process wasn't paused
        self._leaving = threading.Event()
        self._given_up = False  # by the main thread: this one's is to end the process
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        listen()
        self._give_sign()
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """Note what the main thread does from now on.

        Args:
            phase: Its name; all ranks go through the same phases in the same order.
            step: The step's number.
        """
        self._place = (step, self._place[1] + 1, phase, time.monotonic())

    def move(self) -> None:
        """Note that the main thread goes on within a phase that may last longer than one may."""
        self._place = (*self._place[:3], time.monotonic())

    def leave(self) -> None:
        """Stop watching, at the end of a job that went well, together with all ranks.

        A launcher ends the others as soon as one has ended with a code that isn't 0.
        """
        self.enter(LEFT, self._place[0])
        self._give_sign()
        self._await("left")
        # rank 0 is the last: its process may hold the store that the others still speak to
        self._await("gone", alone=self._rank != 0)
        self._leaving.set()
        self._thread.join()

    def _await(self, word: str, alone: bool = False) -> None:
        self._store.set(f"{word}/{self._rank}", "")
        keys = [f"{word}/{peer.rank}" for peer in self._peers]
        while not alone and not self._store.check(keys):
            time.sleep(PERIOD_S / 100)

    def settle(self, error: BaseException) -> BaseException:
        """Decide what a rank that fails raises, so that only one of them speaks.

        Args:
            error: What it met.

        Returns:
            The error itself where it is the job's first failure; where a peer was lost, the
            error that names it; else a SystemExit with the first failure's code.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's: it must not cut us short
        if isinstance(error, SystemExit):
            self._leaving.set()
            return error
        try:
            first = None
            if _lost_a_peer(error):
                first = self._wait_for_the_cause()
                error = PeerLostError(f"the connection to another rank broke: {_first_line(error)}")
            mine = failure_of(error, self._rank)
            first = first or self._claims.claim(mine)
        except RuntimeError:  # the store is gone
            first = mine = failure_of(error, self._rank)
            if isinstance(error, PeerLostError) or _lost_a_peer(error):
                self._given_up = True
                self._thread.join()  # says whose end that was, and ends the process
        if first.hanging:
            self._thread.join()  # prints the stacks and ends the process
        self._leaving.set()
        return error if first == mine else SystemExit(first.code)

    def _wait_for_the_cause(self) -> Failure | None:
        """A broken connection is seldom the cause: who broke it, or who watches, may say more."""
        for _ in range(30):
            if (first := self._claims.look()) is not None:
                return first
            time.sleep(PERIOD_S / 10)
        return None

    def _run(self) -> None:
        reached = before = time.monotonic()
        while not self._leaving.wait(self._period_s):
            now = time.monotonic()
            if now - before > max(GRACE_S, 2 * self._period_s):
                self._awake = now  # a job that was paused as a whole: others were silent no longer
            try:
                failure = self._tick()
                reached = time.monotonic()
            except RuntimeError as error:  # the store's own, all of them
                if time.monotonic() - reached < GRACE_S:
                    before = time.monotonic()
                    continue
                words = f"the job's store can't be reached: {_first_line(error)}"
                if dead := [p for p in self._peers if process_state(p, self._me) in GONE]:
                    words = _tell_killed(dead)  # rank 0, which kept it: each rank says so
                failure = Failure(self._rank, PeerLostError.exit_code, words)
                failure.say()
            if failure is not None:
                return self._end(failure)
            before = time.monotonic()
        return None

    def _tick(self) -> Failure | None:
        """One round; gives the job's failure where there is one."""
        self._give_sign()
        if (failure := self._claims.look()) is not None:
            return failure
        dead = [p for p in self._peers if process_state(p, self._me) in GONE]
        lost = [p for p, phase in zip(dead, self._phases(dead), strict=True) if phase != LEFT]
        if lost:
            return self._speak(_tell_killed(lost))
        stands = self._stands()
        if not stands and self._rank not in (0, len(self._peers) - 1):
            return None  # two watch for signs of all others, and that is enough for the store
        self._read_signs()
        hanging = [
            rank for rank, (_, since) in self._signs.items() if self._age(since) > self._timeout_s
        ]
        if not hanging and stands and self._signs:
            signs = {rank: sign for rank, (sign, _) in self._signs.items()}
            hanging = blame(signs, self._allowance, self._timeout_s)
        return self._speak(self._describe(hanging), tuple(hanging)) if hanging else None

    def _stands(self) -> bool:
        _, _, phase, since = self._place
        most = self._allowance.get(phase, self._timeout_s)
        return most is not None and self._age(since) > most

    def _age(self, since: float) -> float:
        """Seconds since a moment; the time before a pause of this process isn't counted."""
        return time.monotonic() - max(since, self._awake)

    def _give_sign(self) -> None:
        step, place, phase, since = self._place
        frame, waits = position(self._main)
        self._number += 1
        sign = Sign(step, place, phase, self._age(since), frame, waits, self._number)
        self._store.set(f"sign/{self._rank}", json.dumps(asdict(sign)))

    def _phases(self, peers: list[Peer]) -> list[str]:
        """What peers say they do; "" of those that haven't given a sign."""
        keys = [f"sign/{peer.rank}" for peer in peers]
        return [
            json.loads(self._store.get(key))["phase"] if self._store.check([key]) else ""
            for key in keys
        ]

    def _read_signs(self) -> None:
        """Learn what all ranks last said that haven't left, and since when they say so."""
        now, keys = time.monotonic(), {peer.rank: f"sign/{peer.rank}" for peer in self._peers}
        if not self._store.check(list(keys.values())):  # of those that give no first one, too
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        values = self._store.multi_get(list(keys.values()))
        signs = {rank: Sign(**json.loads(v)) for rank, v in zip(keys, values, strict=True)}
        for peer in self._peers:
            sign = signs.get(peer.rank, NEVER)
            before, _ = self._signs.get(peer.rank, (None, now))
            if sign.phase == LEFT:
                self._signs.pop(peer.rank, None)
            elif before is None or before.number != sign.number:
                self._signs[peer.rank] = (sign, now)

    def _describe(self, hanging: list[int]) -> str:
        now, parts = time.monotonic(), []
        for rank in hanging:
            sign, since = self._signs[rank]
            place, seconds = f"step {sign.step}, {sign.phase}", now - since + sign.seconds
            if process_state(self._peers[rank], self._me) == "T":
                words = f"was stopped by a signal (SIGSTOP); last seen in {place}"
            elif self._age(since) > self._timeout_s:
                words = f"gives no sign of life for {now - since:.0f} s; last seen in {place}"
            else:
                words = f"stands in {place}, for {seconds:.0f} s at {sign.frame}"
            parts.append(f"{self._peers[rank]} {words}")
        others = [sign for rank, (sign, _) in self._signs.items() if rank not in hanging]
        waits = {f"{s.waits} in step {s.step}, {s.phase}" for s in others if s.waits is not None}
        if waits:
            parts.append(f"others wait in {' and '.join(sorted(waits))}")
        return "; ".join(parts) + f" (parallel.timeout_s = {self._timeout_s:g})"

    def _speak(self, text: str, hanging: tuple[int, ...] = ()) -> Failure:
        mine = Failure(self._rank, PeerLostError.exit_code, text, hanging)
        if (first := self._claims.claim(mine)) == mine:
            mine.say()
        return first

    def _end(self, failure: Failure) -> None:
        """End this process, whose job has failed, if it doesn't end by itself."""
        if failure.hanging:
            if self._store.check([f"dumped/{self._rank}"]):
                os._exit(failure.code)  # a stopped one that was made to dump: it must not go on
            self._store.set(f"dumped/{self._rank}", "")
            dump(self._me)
            self._help(failure.hanging)
        deadline = time.monotonic() + (0 if failure.hanging else GRACE_S)
        while not self._given_up and time.monotonic() < deadline:
            if self._leaving.wait(PERIOD_S / 10):
                return
        os._exit(failure.code)

    def _help(self, hanging: tuple[int, ...]) -> None:
        """Make ranks of this machine tell where they hang that can't themselves, and end them.

        Whoever doesn't help waits as long, so that its end doesn't end others before they tell.
        """
        here = [p for p in self._peers if process_state(p, self._me) is not None]
        helper = min((p.rank for p in here if p.rank not in hanging), default=-1)
        hung = [p for p in here if p.rank in hanging and helper == self._rank]
        for peer in hung:
            if process_state(peer, self._me) == "T":
                self._store.set(f"dumped/{peer.rank}", "")
                make_dump(peer)  # comes before anything else that it does
                send(peer, signal.SIGCONT)
        time.sleep(1.5 * self._period_s)
        for peer in hung:
            if not self._store.check([f"dumped/{peer.rank}"]):
                make_dump(peer)
        for _ in range(30):  # those that can end do so meanwhile
            hung = [peer for peer in hung if process_state(peer, self._me) not in GONE]
            time.sleep(0.1 * self._period_s if hung else 0.0)
        for peer in hung:
            send(peer, signal.SIGKILL)


def _lost_a_peer(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _tell_killed(peers: list[Peer]) -> str:
    return f"{' and '.join(map(str, peers))} {'was' if len(peers) == 1 else 'were'} killed"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
