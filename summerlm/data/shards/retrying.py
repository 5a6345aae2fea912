"""Doing again what failed for the moment, within one deadline.

Flow: `transfer` asks a store through `retried`; stores raise `Transient` for what may pass.
Nothing is ever skipped: what still fails at the deadline is a `SourceDownError`.

The loop is our own because an attempt must know how much of the deadline is left to it, and the
store's answer says how long to wait; tenacity and stamina know neither without more code than this.
"""

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from summerlm.core.errors import SourceDownError

T = TypeVar("T")

_log = logging.getLogger(__name__)

SILENCE_S = 5.0  # after it whoever waits is told why
FIRST_WAIT_S = 1.0  # longest pause after the first attempt, which doubles with each...
LONGEST_WAIT_S = 30.0  # ...up to this, and to a tenth of the deadline

# the system's: seeding must not make all workers wait alike, nor waiting change what seeds draw
_dice = random.SystemRandom()


class Transient(Exception):  # noqa: N818 - it is no error until the deadline
    """What may pass: a timeout, a cut connection, a store that is busy.

    Args:
        reason: What happened, in a few words.
        retry_after_s: How long the store asks to wait; None = it doesn't say.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


def retried(
    what: str,
    attempt: Callable[[float], T],
    deadline_s: float,
    note: Callable[[dict[str, Any]], None],
) -> T:
    """Try until it works or the deadline has come.

    Args:
        what: File or URL, for messages.
        attempt: Tries once, until the `time.monotonic` it is given; raises `Transient` for what
            may pass.
        deadline_s: Seconds for all attempts and pauses together.
        note: Takes one incident where there was more than one attempt.

    Returns:
        What the first good attempt returned.

    Raises:
        SourceDownError: If none was good in time; it names the last reason.
    """
    start = time.monotonic()
    reasons: dict[str, None] = {}  # all that were met, in order
    told = False
    for number in itertools.count(1):
        try:
            result = attempt(start + deadline_s)
        except Transient as transient:
            fault = transient
            reasons[str(fault)] = None
        else:
            if number > 1:
                reason = f"{what}: {_listed(reasons)}; read at attempt {number}"
                note({"reason": reason, "attempts": number})
            return result
        wait = _pause(number, fault, deadline_s)
        spent = time.monotonic() - start
        if not told and spent + wait > SILENCE_S:
            told = True
            _log.warning(
                "%s: %s; trying again for up to %.0f s (data.deadline_s; data.mirror reads a copy)",
                *(what, fault, deadline_s - spent),
            )
        if spent + wait >= deadline_s:
            break
        time.sleep(wait)
    asked = f", and asks to wait {fault.retry_after_s:.0f} s" if fault.retry_after_s else ""
    reason = f"{what}: {_listed(reasons)}{asked}; given up at attempt {number}"
    note({"reason": reason, "attempts": number})
    raise SourceDownError(f"{reason}, after {spent:.3g} of data.deadline_s = {deadline_s:g} s")


def _listed(reasons: Iterable[str]) -> str:
    return ", ".join(list(reasons)[-3:])  # more would tell no more


def _pause(number: int, fault: Transient, deadline_s: float) -> float:
    """Choose a pause: full jitter on an exponential, after what the store asks for.

    Source:
        Brooker 2015, "Exponential backoff and jitter", AWS Architecture Blog ("full jitter").
    """
    longest = min(FIRST_WAIT_S * 2 ** min(number - 1, 20), LONGEST_WAIT_S, deadline_s / 10)
    return (fault.retry_after_s or 0) + _dice.uniform(0, longest)
