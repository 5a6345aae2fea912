"""The names that a tokenizer goes by in settings and on the command line."""

from pathlib import Path

from summerlm.core.errors import UsageError
from summerlm.tokenizer.mistral import mistral_v3
from summerlm.tokenizer.tokenizer import FILE_NAME, Tokenizer

MISTRAL = "mistral-v3"


def load_tokenizer(name: str) -> Tokenizer:
    """Make or read the tokenizer of a name.

    Args:
        name: "mistral-v3", or the path of a `tokenizer.json` or of a folder that holds one.

    Returns:
        The tokenizer.

    Raises:
        UsageError: If the name is neither, or the file is damaged or another program's.
    """
    if name == MISTRAL:
        return mistral_v3()
    if not Path(name).exists():
        raise UsageError(
            f"no tokenizer {name!r}: name {MISTRAL} or a {FILE_NAME}, or a folder that holds one"
        )
    return Tokenizer.load(Path(name))
