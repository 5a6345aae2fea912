import os
import shutil
import subprocess

import pytest

from summerlm.eval.compression import xz_bytes_after


def test_text_seen_before_costs_almost_nothing():
    noise = os.urandom(20_000)
    assert xz_bytes_after(b"", noise) > 20_000
    assert xz_bytes_after(noise, noise) < 500  # xz copies 273 bytes at most at once
    assert xz_bytes_after(os.urandom(20_000), noise) > 19_900
    assert xz_bytes_after(noise, b"") == 0


def test_the_window_reaches_far_back():
    """Nine megabytes: out of reach of presets below 7."""
    noise = os.urandom(5_000)
    assert xz_bytes_after(noise + bytes(9_000_000), noise) < 500


def test_empty_prefix_costs_what_the_archive_holds_beyond_an_empty_one():
    text = b"the quick brown fox " * 50
    assert 20 < xz_bytes_after(b"", text) < 120


@pytest.mark.skipif(shutil.which("xz") is None, reason="no xz on this machine")
def test_equals_the_xz_command():
    prefix, text = b"one two three " * 300, bytes(range(250)) * 20

    def size(data):
        run = subprocess.run(
            ["xz", "-9e", "-T1", "-c"], input=data, capture_output=True, check=True
        )
        return len(run.stdout)

    assert xz_bytes_after(prefix, text) == size(prefix + text) - size(prefix)
