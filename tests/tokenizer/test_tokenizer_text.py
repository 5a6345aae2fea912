"""What both kinds of tokenizer promise of any text, fresh or copied or read back."""

import copy
import itertools
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import TEXTS

from summerlm.core.errors import SaveError, UsageError
from summerlm.tokenizer.tokenizer import LoneSurrogateError, Tokenizer

# U+2581 is Mistral's way to write a space; the byte level keeps it
NO_LOWER_BLOCK = TEXTS.map(lambda text: text.replace("\u2581", ""))


def through_file(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    tokenizer.save(folder)
    return Tokenizer.load(folder)


@settings(max_examples=150, deadline=None)
@given(text=NO_LOWER_BLOCK)
def test_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    size = len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == size
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text
    assert tokenizer.count_bytes([tokenizer.bos, *ids, tokenizer.eos]) == size
    space = tokenizer.space_in_front and text != ""
    assert tokenizer.byte_lengths[ids].sum() == size + space


@settings(deadline=None)
@given(text=TEXTS)
def test_the_lower_block_becomes_a_space_in_mistral_alone(mistral, learned, text):
    assert learned.decode(learned.encode(text)) == text
    assert mistral.decode(mistral.encode(text)) == text.replace("\u2581", " ")


@settings(deadline=None)
@given(texts=st.lists(TEXTS, max_size=5))
def test_a_batch_is_its_texts(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_stream_gives_whole_characters_that_join_to_the_text(tokenizer, data):
    anything = st.integers(0, tokenizer.vocabulary - 1)
    specials = st.sampled_from(sorted(tokenizer.specials.values()))
    some_bytes = st.sampled_from(tokenizer.encode("é日👩‍👩‍👧 \x00\x80"))
    ids = data.draw(st.lists(anything | specials | some_bytes))
    stream = tokenizer.stream()
    parts = [*map(stream.push, ids), stream.flush()]
    assert "".join(parts) == tokenizer.decode(ids)


@settings(deadline=None)
@given(text=NO_LOWER_BLOCK)
def test_a_stream_of_real_text_is_a_prefix_of_it_at_any_time(tokenizer, text):
    stream, so_far = tokenizer.stream(), ""
    for token in tokenizer.encode(text):
        so_far += stream.push(token)
        assert text.startswith(so_far)
    assert so_far == text
    assert stream.flush() == ""


def test_a_stream_keeps_the_space_after_a_prompt(mistral):
    stream = mistral.stream()
    prompt = [stream.push(token) for token in [mistral.bos, *mistral.encode("one")]]
    assert "".join(prompt) == "one"
    assert stream.push(mistral.encode("two")[0]) == " two"


def test_a_stream_that_stops_inside_a_character_says_so(tokenizer):
    first, *_ = tokenizer.encode("\U0010ffff")[-4:]  # no token for it: four bytes
    stream = tokenizer.stream()
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert tokenizer.decode([first]) == "\ufffd"


COPIES = {
    "as made": lambda tokenizer, folder: tokenizer,
    "saved": through_file,
    "saved twice": lambda t, folder: through_file(through_file(t, folder / "a"), folder / "b"),
    "pickled": lambda tokenizer, folder: pickle.loads(pickle.dumps(tokenizer)),
    "copied": lambda tokenizer, folder: copy.copy(tokenizer),
    "deep-copied": lambda tokenizer, folder: copy.deepcopy({"in": [tokenizer]})["in"][0],
}


@pytest.mark.parametrize("how", COPIES)
def test_no_special_id_ever_comes_from_text(tokenizer, how, tmp_path):
    copied = COPIES[how](tokenizer, tmp_path)
    specials = set(copied.specials.values())
    spellings = list(copied.specials)
    texts = [
        *spellings,
        *(f"x{t}y" for t in spellings),
        *(f" {t}\n{t}" for t in spellings),
        *(f"{t[:2]}{t}{t[2:]}" for t in spellings),  # nested
        *(a + b for a, b in itertools.pairwise(spellings)),
        "".join(spellings),
    ]
    for text, ids in zip(texts, copied.encode_batch(texts), strict=True):
        assert ids == tokenizer.encode(text)
        assert not specials & set(ids), text
        assert copied.decode(ids) == text
        assert copied.encode(text) == ids


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_everything(tokenizer, how, tmp_path):
    copied = COPIES[how](tokenizer, tmp_path)
    assert copied.fingerprint == tokenizer.fingerprint
    assert copied.specials == tokenizer.specials
    assert np.array_equal(copied.byte_lengths, tokenizer.byte_lengths)
    assert (copied.vocabulary, copied.bos, copied.eos) == (
        *(tokenizer.vocabulary, tokenizer.bos, tokenizer.eos),
    )


def test_a_worker_process_encodes_the_same(learned):
    text = "<s> <p> print(x)"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(learned.encode, text).result() == learned.encode(text)


def test_decoding_agrees_with_the_library_s_own(tokenizer):
    texts = ["", " ", "  two", "é日本👩‍👩‍👧", "tab\tnew\n", "<s>[INST]"]
    for text in texts:
        assert tokenizer._backend.decode(tokenizer.encode(text)) == text


def test_fingerprints_differ(mistral, learned):
    assert mistral.fingerprint != learned.fingerprint


def test_byte_lengths_are_of_the_bytes_and_read_only(tokenizer):
    lengths = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocabulary)]
    assert tokenizer.byte_lengths.tolist() == lengths
    assert {i for i, n in enumerate(lengths) if n == 0} == set(tokenizer.specials.values())
    with pytest.raises(ValueError, match="read-only"):
        tokenizer.byte_lengths[0] = 1


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "\ud83d \ude00"])
def test_a_lone_surrogate_is_a_value_error_that_says_where(tokenizer, text):
    with pytest.raises(LoneSurrogateError, match=r"lone surrogate U\+D[0-9A-F]{3} at character"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="no UTF-8 form"):
        tokenizer.encode_batch(["good", text])


@pytest.mark.parametrize("ids", [[-1], [10**9], [3, -100]])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, ids):
    stream = tokenizer.stream()
    for use in (tokenizer.decode, tokenizer.count_bytes, lambda ids: [*map(stream.push, ids)]):
        with pytest.raises(UsageError, match=rf"id {ids[-1]} isn't in 0\.\."):
            use(ids)


def test_numpy_ids_are_ids(tokenizer):
    ids = np.array(tokenizer.encode("a text"), dtype=np.int32)
    assert tokenizer.decode(ids) == "a text"


def test_a_failed_save_leaves_the_file_as_it_was(learned, tmp_path, monkeypatch):
    learned.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SaveError, match="No space left"):
        learned.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_bytes() == before
