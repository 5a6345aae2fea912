"""Dialogues -> ids under the chat template of Mistral's v3 tokenizer.

Flow: `data` encodes the conversations of a pretraining source here.

A user's turn stands between [INST] and [/INST], an assistant's turn ends with EOS, a system text
goes before the user's turn that follows it. The marks are ids that only code inserts: a turn
that spells `[INST]` stays text.

Source:
    Mistral AI, mistral-common, InstructTokenizerV3.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from summerlm.core.errors import UsageError
from summerlm.tokenizer.tokenizer import Tokenizer

BEGIN_USER, END_USER = "[INST]", "[/INST]"


def check_chat(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer without the template's marks.

    Args:
        tokenizer: Any tokenizer.

    Raises:
        UsageError: If it lacks them.
    """
    missing = [mark for mark in (BEGIN_USER, END_USER) if mark not in tokenizer.specials]
    if missing:
        raise UsageError(
            f"the tokenizer has no {' and no '.join(missing)}: it knows no chat template; set "
            'template = "original", or tokenizer.name = "mistral-v3"'
        )


def encode_turns(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]) -> NDArray[np.int32]:
    """Encode a dialogue.

    Args:
        tokenizer: A tokenizer that `check_chat` accepts.
        turns: Role ("system", "user" or "assistant") and text of each turn.

    Returns:
        Its ids, (n,), int32, without the BOS and without the EOS that end the document.
    """
    begin, end = tokenizer.specials[BEGIN_USER], tokenizer.specials[END_USER]
    parts: list[NDArray[np.int32]] = []
    instruction: list[str] = []  # system texts that wait for a user's turn
    for role, text in turns:
        if role == "system":
            instruction.append(text)
        elif role == "user":
            parts += _user(tokenizer, "\n\n".join([*instruction, text]), begin, end)
            instruction = []
        else:
            parts += [tokenizer.encode_array(text), np.array([tokenizer.eos], np.int32)]
    if instruction:
        parts += _user(tokenizer, "\n\n".join(instruction), begin, end)
    if turns and turns[-1][0] == "assistant":
        parts.pop()  # the document's own EOS ends its last turn
    return np.concatenate([np.empty(0, np.int32), *parts])


def _user(tokenizer: Tokenizer, text: str, begin: int, end: int) -> list[NDArray[np.int32]]:
    marks = np.array([begin, end], np.int32)
    return [marks[:1], tokenizer.encode_array(text), marks[1:]]
