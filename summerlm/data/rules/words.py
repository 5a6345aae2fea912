"""A text's words, alike however it is cased, spaced or punctuated.

Flow: `contamination` and `duplicates` compare texts by them. A word is a run of letters and
digits after Unicode's compatibility normalisation (NFKC) and case folding; in scripts that are
written without spaces every character is a word.
"""

import re
import unicodedata

# Thai and Lao, Myanmar, Khmer, kana, and the ideographs
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[^\W_{_UNSPACED}]+|(?![\W_])[{_UNSPACED}]")
_ASCII = {code: " " for code in range(128) if not chr(code).isalnum()}


def normalised_words(text: str) -> list[str]:
    """Cut a text into words for comparison with other texts.

    Args:
        text: The text.

    Returns:
        The words in order.

    Example:
        >>> normalised_words("It's  ﬁne: 東京, STRASSE/straße_2")
        ['it', 's', 'fine', '東', '京', 'strasse', 'strasse', '2']
    """
    if text.isascii():
        return text.lower().translate(_ASCII).split()  # the same as below, and faster
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
