"""Documents -> ids: BOS, what the text or the dialogue encodes to, EOS.

Flow: `packing` calls the `Encoder` of a document's source. A source of plain text, or of
dialogues written as lines, gives texts; one with the chat template gives the turns as JSON.
"""

import json
from typing import NamedTuple

import numpy as np

from summerlm.tokenizer.chat import check_chat, encode_turns
from summerlm.tokenizer.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """A document's ids.

    Args:
        ids: The ids with BOS and EOS, (n,), int32.
        surplus: UTF-8 bytes of its text beyond those that the ids stand for; below zero where the
            tokenizer puts spaces in front of texts.
    """

    ids: np.ndarray
    surplus: int


class Encoder:
    """Encodes the documents of one source.

    Args:
        tokenizer: The tokenizer.
        chat: Whether documents are dialogues under the tokenizer's chat template.

    Raises:
        UsageError: If the tokenizer has no chat template and one is asked for.
    """

    def __init__(self, tokenizer: Tokenizer, chat: bool) -> None:
        if chat:
            check_chat(tokenizer)
        self._tokenizer, self._chat = tokenizer, chat

    def __call__(self, document: str) -> Encoded:
        """Encode one document.

        Args:
            document: A text, or the turns of a dialogue as JSON, as its source gives it.

        Returns:
            Its ids and what they lack.
        """
        tokenizer = self._tokenizer
        if self._chat:
            turns = json.loads(document)
            inside = encode_turns(tokenizer, turns)
            size = sum(len(text.encode()) for _, text in turns)
        else:
            inside = tokenizer.encode_array(document)
            size = len(document.encode())
        ids = np.concatenate(([tokenizer.bos], inside, [tokenizer.eos]), dtype=np.int32)
        assert tokenizer.bos not in ids[1:], "text may never encode to a special id"
        return Encoded(ids, size - int(tokenizer.byte_lengths[ids].sum()))
