import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.core.errors import UsageError
from summerlm.data.shards import stdlib
from summerlm.data.shards.stdlib import (
    SHARED_RUN,
    Split,
    library_folder,
    shared_run,
    standard_library,
)


def brute(train: list[str], text: str, length: int) -> set[str]:
    runs = {text[i : i + length] for i in range(len(text) - length + 1)}
    return {run for run in runs if any(run in other for other in train)}


@settings(deadline=None)
@given(
    st.lists(st.text("ab", max_size=40), max_size=4), st.text("ab", max_size=40), st.integers(1, 13)
)
def test_shared_runs_against_brute_force(train: list[str], text: str, length: int) -> None:
    run, runs = shared_run(train, text, length), brute(train, text, length)
    assert run in runs if runs else run is None


@pytest.mark.parametrize("length", [199, 200, 201])
def test_one_character_decides(length: int) -> None:
    noise = random.Random(length)
    letters = "".join(chr(n) for n in range(0x4E00, 0x9000))
    for _ in range(100):
        run = "".join(noise.choices(letters, k=length))
        a, b, c, d = ("".join(noise.choices("xyz", k=noise.randrange(500))) for _ in range(4))
        found = shared_run(["other", f"{a}1{run}2{b}"], f"{c}3{run}4{d}", SHARED_RUN)
        assert (found is not None) == (length >= SHARED_RUN)
        assert found is None or found in run


def test_repeats_take_no_longer() -> None:
    """Looked up place by place this would take minutes."""
    rule = "-" * 199 + "\n"
    assert shared_run([rule * 500], ("-" * 199 + "|") * 500) is None
    assert shared_run([rule * 500], rule * 500) is not None


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of 300 files of noise, some planted, of which `modN.py` are held out as real."""
    noise = random.Random(0)
    for n in range(300):
        (tmp_path / f"mod{n:03}.py").write_text(f"{n} {noise.randbytes(300).hex()}\n")
    monkeypatch.setattr(stdlib.sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    return tmp_path


def relative(split: Split) -> tuple[list[str], list[str]]:
    root = library_folder()
    train, held_out = ([path.relative_to(root).as_posix() for path in part] for part in split)
    return train, held_out


def test_what_is_left_out(library: Path) -> None:
    expected = relative(standard_library())
    assert 5 <= len(expected[1]) <= 35
    assert sorted([*expected[0], *expected[1]]) == [f"mod{n:03}.py" for n in range(300)]
    for name in [
        "site-packages/numpy.py",
        "dist-packages/numpy.py",
        "json/__pycache__/x.py",
        "test/support.py",
        "lib2to3/tests/data/latin.py",
        "idlelib/idle_test/test_x.py",
        "encodings/cp037.py",
        "pydoc_data/topics.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "module.so",
        "readme.txt",
    ]:
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text("left out")
    assert relative(standard_library()) == expected


def test_a_shared_run_takes_the_file_out_of_both(library: Path) -> None:
    train, held_out = relative(standard_library())
    text = (library / train[0]).read_text()
    first = library / held_out[0]
    first.write_text(first.read_text() + text[100 : 100 + SHARED_RUN])
    second = library / held_out[1]
    second.write_text(second.read_text() + text[100 : 100 + SHARED_RUN - 1] + "!")
    third, fourth = library / held_out[2], library / held_out[3]
    third.write_text(fourth.read_text())  # two held-out files may share what they like
    assert relative(standard_library()) == (train, held_out[1:])


def test_short_and_undecodable_files_are_trained_on(library: Path) -> None:
    train, held_out = relative(standard_library())
    (library / held_out[0]).write_text("x" * (SHARED_RUN - 1))
    (library / held_out[1]).write_bytes(b"# caf\xe9\n" * 100)
    moved = relative(standard_library())
    assert moved == (sorted([*train, *held_out[:2]]), held_out[2:])


def test_a_python_without_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=r"too few \.py files"):
        standard_library()


@pytest.mark.parametrize("stride", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_the_real_library(stride: int) -> None:
    split = standard_library()
    train, held_out = relative(split)
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert not set(train) & set(held_out)
    assert len(train) > 400
    assert 0.01 < len(held_out) / len(train) < 0.1
    texts = [path.read_bytes().decode() for path in split.held_out]
    assert sum(map(len, texts)) > 50_000
    runs = {text[i : i + SHARED_RUN] for text in texts for i in range(len(text) - SHARED_RUN + 1)}
    for path in split.train[::stride]:
        text = path.read_bytes().decode("utf-8", "replace")
        windows = (text[i : i + SHARED_RUN] for i in range(len(text) - SHARED_RUN + 1))
        assert runs.isdisjoint(windows), path
