"""Mistral's vocabulary: ids equal to sentencepiece's, on real text and on hard text."""

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from sentencepiece import SentencePieceProcessor
from tokenizer_texts import TEXTS

from summerlm.core.errors import UsageError
from summerlm.tokenizer import mistral as station
from summerlm.tokenizer.tokenizer import Tokenizer


def assert_same_ids(
    tokenizer: Tokenizer, reference: SentencePieceProcessor, texts: list[str]
) -> None:
    ours, theirs = tokenizer.encode_batch(texts), reference.encode(texts)
    for text, mine, other in zip(texts, ours, theirs, strict=True):
        assert mine == other, text[:200]
        assert tokenizer.count_bytes(mine) == len(text.encode()), text[:200]
        assert tokenizer.decode(mine) == text


def test_ids_on_a_sample_of_real_documents(mistral, reference, documents):
    sample = random.Random(0).sample(documents, 1200)
    assert_same_ids(mistral, reference, sample)


@pytest.mark.slow
def test_ids_on_every_real_document(mistral, reference, documents):
    for start in range(0, len(documents), 1000):
        assert_same_ids(mistral, reference, documents[start : start + 1000])


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("\x00")
@example("\u2581 \u2581")
def test_ids_on_hard_unicode(mistral, reference, text):
    assert mistral.encode(text) == reference.encode(text)


def test_ids_on_runs_of_one_character(mistral, reference):
    # pieces of 2 to 16 spaces share one score, so that only the order of merging decides
    for run in range(120):
        for text in (" " * run, f"x{' ' * run}y", f"\n{' ' * run}", f"{'-' * run}", "a" * run):
            assert mistral.encode(text) == reference.encode(text), (run, text)


def test_ids_where_two_ways_to_one_piece_overlap(mistral, reference):
    """A text `xyz` where `xy` and `yz` are the same piece: which pair goes first shows."""
    size = reference.get_piece_size()
    scores = {reference.id_to_piece(i): reference.get_score(i) for i in range(size)}
    right = {
        piece: {piece[:cut]: piece[cut:] for cut in range(1, len(piece))}
        for piece, score in scores.items()
        if score
    }
    cases = 0
    for cuts in right.values():
        for x, y in cuts.items():
            if y in cuts and {x, y, cuts[y]} <= right.keys():
                text = (x + y + cuts[y]).replace("\u2581", " ")
                for hard in (text, f"x{text}", f"{text}x", text * 3):
                    assert mistral.encode(hard) == reference.encode(hard), hard
                cases += 1
    assert cases > 400


def test_the_vocabulary_is_the_original_s(mistral, reference):
    assert mistral.vocabulary == 32_773
    assert (mistral.bos, mistral.eos) == (reference.bos_id(), reference.eos_id()) == (1, 2)
    added = [mistral.specials[t] for t in ("<p>", "<think>", "</think>", "<doc>", "</doc>")]
    assert added == [32_768, 32_769, 32_770, 32_771, 32_772]
    for i in range(reference.get_piece_size()):
        piece = reference.id_to_piece(i)
        if reference.is_control(i) or reference.is_unknown(i) or piece.startswith("[REFERENCE_"):
            assert mistral.specials[piece] == i
            assert mistral.token_bytes(i) == b""
        elif reference.is_byte(i):
            assert mistral.token_bytes(i) == bytes([int(piece[3:5], 16)])
        else:
            assert mistral.token_bytes(i) == piece.replace("\u2581", " ").encode()
    assert len(mistral.specials) == 1 + 750 + 20 + 5


def test_reference_pieces_are_text_here_and_ids_in_sentencepiece(mistral, reference):
    text = "see [REFERENCE_DOC_7]"
    piece = mistral.specials["[REFERENCE_DOC_7]"]
    assert piece in reference.encode(text)
    assert piece not in mistral.encode(text)
    assert mistral.decode(mistral.encode(text)) == text


def test_the_fingerprint_is_pinned(mistral):
    # checkpoints carry it: a change here makes every checkpoint of a Mistral run foreign
    assert mistral.fingerprint == (
        "217df897320f30ab1e2ffa2fd2f9fa5fd180075c31c6d834801b0ac939fd761d"
    )


@pytest.mark.parametrize("data", [b"", b"another vocabulary", None])
def test_a_changed_or_missing_vocabulary_file_is_named(monkeypatch, tmp_path: Path, data):
    (tmp_path / "data").mkdir()
    if data is not None:
        (tmp_path / "data" / station._FILE).write_bytes(data)
        assert hashlib.sha256(data).hexdigest() != station._SHA256
    monkeypatch.setattr(station.resources, "files", lambda package: tmp_path)
    with pytest.raises(UsageError, match=r"model\.v3: .*install mistral-common anew"):
        station.mistral_v3()
