"""Text to ids and back, with the bytes of every id known.

Flow: made by `mistral`, `learn` or from a file (`registry` chooses); `data` encodes documents in
worker processes, `generate` streams text from ids, `eval` counts bytes, checkpoints store it.

Text is text: no text encodes to a special id, whatever it spells (`<s>`, `[INST]`, `<p>`); only
code inserts special ids. All leading and trailing white space is kept.

Shapes: V vocabulary.
"""

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from summerlm.core.errors import UsageError
from summerlm.core.files import write_atomically
from summerlm.tokenizer.parts import cut_at_matches, cut_at_spaces, words_begin_tokens
from summerlm.tokenizer.pipeline import BOS, EOS, read_definition

FILE_NAME = "tokenizer.json"


class LoneSurrogateError(UsageError, ValueError):
    """A text holds half of a surrogate pair, as broken JSON can: it has no UTF-8 form."""


def refuse_lone_surrogates(text: str) -> None:
    r"""Refuse a text that has no UTF-8 form.

    Args:
        text: Any text.

    Raises:
        LoneSurrogateError: If half of a surrogate pair stands alone in it.

    Example:
        >>> refuse_lone_surrogates("ab\ud800")
        Traceback (most recent call last):
        summerlm.tokenizer.tokenizer.LoneSurrogateError: lone surrogate U+D800 at character 2: ...
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LoneSurrogateError(
            f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
            "such a text has no UTF-8 form"
        ) from None


class Tokenizer:
    """Encode texts and decode ids, without loss.

    `decode(encode(text)) == text`, but that Mistral's vocabulary writes the space as U+2581 and
    so gives a U+2581 back as a space. Pickling and copying keep every promise.

    Args:
        backend: A pipeline of `pipeline`, filled; belongs to the tokenizer from here on.

    Attributes:
        vocabulary: Number of ids V.
        bos: Id that begins a document.
        eos: Id that ends a document.
        specials: Id of each special token.
        space_in_front: Whether a text's first id carries a space that the text doesn't have.
        fingerprint: SHA-256 in hexadecimal of all that decides ids.
        byte_lengths: Bytes of text that each id stands for, (V,), int64; 0 for special ids.

    Raises:
        ValueError: If the pipeline can't keep the promises above.
    """

    def __init__(self, backend: Backend) -> None:
        definition = read_definition(backend)
        # "encode them" means as the text they are; the library forgets it with each copy
        backend.encode_special_tokens = True
        self._backend = backend
        self._token_bytes = dict(enumerate(definition.token_bytes))  # a dict: has no id -1
        self.space_in_front = definition.space_in_front
        self._pattern = definition.pattern
        self._words_begin_tokens = words_begin_tokens(definition.token_bytes)
        self.vocabulary = len(definition.token_bytes)
        self.specials = definition.specials
        self.bos = self.specials[BOS]
        self.eos = self.specials[EOS]
        self.fingerprint = definition.fingerprint
        self.byte_lengths = np.array([len(b) for b in definition.token_bytes], dtype=np.int64)
        self.byte_lengths.setflags(write=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle through the constructor, which makes special tokens text again."""
        return _restore, (self._backend.to_str(),)

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids.

        Args:
            text: Any text.

        Returns:
            Its ids, without BOS and EOS, none of them special; empty for an empty text.

        Raises:
            LoneSurrogateError: If the text has no UTF-8 form.
        """
        return self.encode_batch([text])[0]

    def encode_array(self, text: str) -> NDArray[np.int32]:
        """Turn a text of any length into ids, fast and in memory that grows little beyond them.

        A long text is encoded in parts, cut where no merge can cross; the ids are the same.

        Args:
            text: Any text.

        Returns:
            What `encode` gives, (n,), int32.

        Raises:
            LoneSurrogateError: If the text has no UTF-8 form.
        """
        if self._pattern is not None:
            cut = cut_at_matches(text, self._pattern)
        else:
            cut = cut_at_spaces(text) if self._words_begin_tokens else iter([text])
        parts = [np.array(self.encode(part), np.int32) for part in cut]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into ids, several at a time where there are several cores.

        Args:
            texts: Any texts.

        Returns:
            For each text what `encode` gives.

        Raises:
            LoneSurrogateError: If one of the texts has no UTF-8 form.
        """
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # all that the library says of a text without UTF-8 form
            for text in texts:
                refuse_lone_surrogates(text)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn the ids of one whole text back into it.

        Args:
            ids: Any ids; special ones are dropped.

        Returns:
            The text, with U+FFFD where the bytes of the ids aren't UTF-8.

        Raises:
            UsageError: If an id lies outside the vocabulary.
        """
        return self._text_bytes(ids).decode(errors="replace")

    def count_bytes(self, ids: Iterable[int]) -> int:
        """Count the bytes of UTF-8 that the ids of one whole text stand for.

        Args:
            ids: Ids of a text from its beginning; special ones count nothing.

        Returns:
            `len(text.encode())` for the ids of a text, if it holds no U+2581.

        Raises:
            UsageError: If an id lies outside the vocabulary.
        """
        return len(self._text_bytes(ids))

    def token_bytes(self, token: int) -> bytes:
        """Give the bytes of text that an id stands for; none for a special id.

        Args:
            token: An id.

        Returns:
            Its bytes. They may begin or end inside a UTF-8 character.

        Raises:
            UsageError: If the id lies outside the vocabulary.
        """
        return self._joined_bytes([token])

    def stream(self) -> "TextStream":
        """Begin to decode id by id.

        Returns:
            A stream that stands at the beginning of a text. To go on after a prompt, push the
            prompt's ids first: a space before the first new word is then kept.
        """
        return TextStream(self)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, whole or not at all.

        Args:
            folder: Where to; made where it is missing.

        Raises:
            SaveError: If the disk refuses.
        """
        write_atomically(folder / FILE_NAME, self._backend.to_str().encode())

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer that `save` wrote.

        Args:
            path: The file, or the folder that holds it as `tokenizer.json`.

        Returns:
            The tokenizer, with the fingerprint that it was saved with.

        Raises:
            UsageError: If the file is missing, damaged or another program's.
        """
        file = path / FILE_NAME if path.is_dir() else path
        try:
            backend = Backend.from_str(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{file}: no such file; it should hold a tokenizer") from None
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"{file}: can't be read as a tokenizer: {error}") from None
        try:
            return cls(backend)
        except ValueError as error:
            raise UsageError(f"{file}: not a tokenizer of SummerLM: {error}") from None

    def _text_bytes(self, ids: Iterable[int]) -> bytes:
        joined = self._joined_bytes(ids)
        return joined.removeprefix(b" ") if self.space_in_front else joined

    def _joined_bytes(self, ids: Iterable[int]) -> bytes:
        try:
            return b"".join(map(self._token_bytes.__getitem__, ids))
        except KeyError as error:
            raise UsageError(f"id {error} isn't in 0..{self.vocabulary - 1}") from None


class TextStream:
    """Decode id by id, giving out only whole characters.

    Args:
        tokenizer: What the ids belong to.

    Example:
        >>> from summerlm.tokenizer.learn import learn_bpe
        >>> tokenizer = learn_bpe([], 263)  # no merges: an id a byte
        >>> stream = tokenizer.stream()
        >>> [stream.push(token) for token in tokenizer.encode("é!")]
        ['', 'é', '!']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.space_in_front

    def push(self, token: int) -> str:
        """Take the next id.

        Args:
            token: An id; a special one gives nothing.

        Returns:
            The characters that it completes, maybe none.

        Raises:
            UsageError: If the id lies outside the vocabulary.
        """
        piece = self._tokenizer.token_bytes(token)
        if piece and self._drop_space:
            piece = piece.removeprefix(b" ")
            self._drop_space = False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """End the text.

        Returns:
            U+FFFD if the text stops inside a character, else nothing.
        """
        return self._decoder.decode(b"", final=True)


def _restore(definition: str) -> Tokenizer:
    return Tokenizer(Backend.from_str(definition))
