"""Errors that a user can cause or meet, each with the exit code the command ends with.

Flow: raised by every station; `cli` prints the message in one line and exits with `exit_code`.
Anything else that is raised is a bug of ours and keeps its traceback.
"""

from typing import ClassVar


class SummerError(Exception):
    """A failure that is explained to the user in one line, without a traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(SummerError):
    """Wrong use: a setting, argument or file that can't mean anything."""

    exit_code = 2


class NoCheckpointError(SummerError):
    """No checkpoint can be trusted: none is there, or all that are there are damaged."""

    exit_code = 3


class DataChangedError(SummerError):
    """The data are not those that the run or checkpoint was made with."""

    exit_code = 4


class SourceDownError(SummerError):
    """A data source can't be read, after all retries."""

    exit_code = 5


class DamagedDataError(SourceDownError):
    """A part of a file can't be decoded, even when its bytes are fetched again."""


class WorkerDiedError(SummerError):
    """A process that makes batches was killed."""


class CorruptionError(SummerError):
    """Ranks that must hold the same bits don't: a device or its memory failed silently."""


class PeerLostError(SummerError):
    """A rank of the job was killed, hangs, or can't be reached."""


class SaveError(SummerError):
    """A file or checkpoint can't be written."""

    exit_code = 6


class FolderHeldError(SummerError):
    """Another process holds the run folder."""

    exit_code = 7


class DeviceMemoryError(SummerError):
    """The device has too little memory for the settings."""

    exit_code = 8


class DivergedError(SummerError):
    """Training produced non-finite values too many times in a row."""

    exit_code = 9


def explain(error: BaseException) -> SummerError | None:
    """Find what can be told to the user in one line.

    Args:
        error: What was raised.

    Returns:
        The error to tell; a `DeviceMemoryError` where torch or Python ran out of memory; None
        for a bug of ours.
    """
    if isinstance(error, SummerError):
        return error
    words = str(error)
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's class on GPUs
        or (
            isinstance(error, RuntimeError)
            and ("can't allocate memory" in words or "not enough memory" in words)
        )
    ):
        advice = "lower parallel.micro_batch_rows or train.batch_tokens"
        return DeviceMemoryError(f"out of memory: {words.partition(chr(10))[0]}; {advice}")
    return None
