"""Named places where a test, or a person in doubt, lets a process fail.

Flow: what writes to the disk calls `reach` between two of its steps; it does nothing unless the
environment asks for that place. `SUMMERLM_FAILPOINT=NAME[@RANK][#TIME]:ACTION` acts when a process
(of that rank) reaches NAME (for the TIME-th time, from 1): "kill" (SIGKILL), "stop" (SIGSTOP),
"raise" (a bug), "enospc" (the disk is full).
"""

import errno
import os
import re
import signal

from summerlm.core.errors import UsageError

VARIABLE = "SUMMERLM_FAILPOINT"

# in the order in which a save reaches them
POINTS = (
    "save.asked",  # nothing is copied yet
    "save.copied",  # the state stands in buffers, the files are still to be written
    "write.drafted",  # the draft's folder is there
    "write.begun",  # a file holds its first bytes
    "write.written",  # a file is written, not synced
    "write.synced",  # a file is synced
    "write.reopened",  # a file was read back
    "write.done",  # all files of this rank
    "publish.begun",  # all files of all ranks; from here on the leading rank alone
    "publish.manifest_written",
    "publish.manifest_synced",
    "publish.folder_synced",
    "publish.renamed",
    "publish.parent_synced",
    "prune.renamed",  # a checkpoint has lost its name and is still to be deleted
    "prune.done",
    "publish.done",
    "save.announced",  # all ranks know
    "branch.moved",  # one of the later checkpoints lies in the branch
    "aside.moved",  # a damaged one is set aside
)
ACTIONS = ("kill", "stop", "raise", "enospc")
_FORM = re.compile(r"([\w.]+)(?:@(\d+))?(?:#(\d+))?:(\w+)")
_reached: dict[str, int] = {}


def reach(name: str) -> None:
    """Fail here if the environment asks for it.

    Args:
        name: One of `POINTS`.

    Raises:
        UsageError: If the variable names no place or no action.
        OSError: If the action is "enospc".
        RuntimeError: If the action is "raise".
    """
    assert name in POINTS, f"{name} is no failpoint"
    wish = os.environ.get(VARIABLE)
    if not wish:
        return
    match = _FORM.fullmatch(wish)
    if match is None or match[1] not in POINTS or match[4] not in ACTIONS:
        raise UsageError(
            f"{VARIABLE}={wish}: write NAME[@RANK][#TIME]:ACTION with a name of "
            f"{', '.join(POINTS)} and an action of {', '.join(ACTIONS)}"
        )
    point, rank, time, action = match.groups()
    if point != name or (rank is not None and rank != os.environ.get("RANK", "0")):
        return
    _reached[name] = _reached.get(name, 0) + 1
    if time is None or int(time) == _reached[name]:
        _fail(name, action)


def _fail(name: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise RuntimeError(f"failpoint {name}")
