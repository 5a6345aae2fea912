"""The raw value of one row -> its text, or the reason why it has none.

Flow: `formats` and `jsonlines` hand over what stands in a row; `sources` counts the reasons
and passes the texts on, which are never stripped or normalised.
"""

import json
import re
from typing import NamedTuple

TURN_KEYS = (("from", "value"), ("role", "content"))  # ShareGPT's and OpenAI's (speaker, text)
ROLES = {  # of the chat template, by what data sets call them
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
}

_SURROGATE = re.compile("[\ud800-\udfff]")


class Dropped(NamedTuple):
    """What stands in place of a row's text.

    Args:
        reason: Why there is none, in a few words; the ledger counts rows by it.
    """

    reason: str


Row = str | Dropped

# why a row's bytes give no text
NULL = Dropped("null or missing")
EMPTY = Dropped("empty or white space only")
WRONG_TYPE = Dropped("wrong type")
BAD_UTF8 = Dropped("not UTF-8")
SURROGATE = Dropped("lone surrogate")
NOT_JSON = Dropped("not a JSON object")
TOO_LONG = Dropped("line longer than 256 MiB")


def plain_text(value: object) -> Row:
    r"""Read the value of a text column.

    Args:
        value: What stands in the row; bytes are taken as UTF-8.

    Returns:
        The text as it stands, or why there is none.

    Example:
        >>> plain_text(b"  if x:\r\n"), plain_text(7)
        ('  if x:\r\n', Dropped(reason='wrong type'))
    """
    text = _decode(value)
    return EMPTY if isinstance(text, str) and _blank(text) else text


def dialogue(value: object) -> Row:
    r"""Read the value of a conversations column as the original SummerLM wrote it.

    Args:
        value: A list of turns, each a mapping with `from` and `value`, or `role` and `content`.

    Returns:
        A line `ROLE: text` for each turn, or why there is no text.

    Example:
        >>> dialogue([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
        '\nHUMAN: Hi\nGPT: Hello'
    """
    read = _turns(value)
    if isinstance(read, Dropped):
        return read
    return "".join(f"\n{speaker.upper()}: {text}" for speaker, text in read)


def turns(value: object) -> Row:
    """Read the value of a conversations column for a chat template.

    Args:
        value: As for `dialogue`.

    Returns:
        JSON of the turns, each a role (`system`, `user`, `assistant`) and its text, or why there
        are none.

    Example:
        >>> turns([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
        '[["user", "Hi"], ["assistant", "Hello"]]'
    """
    read = _turns(value)
    if isinstance(read, Dropped):
        return read
    named = [(ROLES.get(speaker.lower()), text) for speaker, text in read]
    if any(role is None for role, _ in named):
        return WRONG_TYPE
    return json.dumps(named, ensure_ascii=False)


def _turns(value: object) -> list[tuple[str, str]] | Dropped:
    """Read speaker and text of each turn."""
    if value is None:
        return NULL
    if not isinstance(value, list):
        return WRONG_TYPE
    read: list[tuple[str, str]] = []
    for turn in value:
        keys = next((k for k in TURN_KEYS if isinstance(turn, dict) and set(k) <= set(turn)), None)
        if keys is None:
            return WRONG_TYPE
        speaker, text = (_decode(turn[key]) for key in keys)
        if isinstance(speaker, Dropped):
            return speaker
        if isinstance(text, Dropped):
            return text
        read.append((speaker, text))
    return EMPTY if all(_blank(text) for _, text in read) else read


def _decode(value: object) -> Row:
    if value is None:
        return NULL
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return BAD_UTF8
    if not isinstance(value, str):
        return WRONG_TYPE
    return SURROGATE if _SURROGATE.search(value) else value


def _blank(text: str) -> bool:
    return not text or text.isspace()
