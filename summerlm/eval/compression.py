"""What a general-purpose compressor makes of a text: a floor under every language model.

Flow: the demo's recipe compares its model with `xz_bytes_after`.
"""

import lzma

PRESET = 9 | lzma.PRESET_EXTREME  # what `xz -9e` does: a window of 64 MiB


def xz_bytes_after(prefix: bytes, text: bytes) -> int:
    """Count the bytes that a text adds to an `xz -9e` archive that begins with a prefix.

    The compressor may copy from the prefix as far as its window of 64 MiB reaches: where prefix
    and text are longer together, it has forgotten the prefix's beginning.

    Args:
        prefix: What is compressed before the text, such as a model's training text.
        text: What is measured.

    Returns:
        Size of the archive of both less size of the archive of the prefix alone.

    Example:
        >>> text = bytes(range(256)) * 4
        >>> xz_bytes_after(text, text) < 10 < xz_bytes_after(b"", text)
        True
    """
    whole = lzma.compress(prefix + text, preset=PRESET)
    return len(whole) - len(lzma.compress(prefix, preset=PRESET))
