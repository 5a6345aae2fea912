"""Long texts encode in parts to the same ids; dialogues encode as in Mistral's own library."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.core.errors import UsageError
from summerlm.tokenizer import parts
from summerlm.tokenizer.chat import check_chat, encode_turns
from summerlm.tokenizer.learn import learn_bpe
from summerlm.tokenizer.mistral import mistral_v3
from summerlm.tokenizer.tokenizer import Tokenizer

TEXTS = st.text(st.sampled_from("ab \u2581\n\t.,1é'ß漢"), max_size=120)


@pytest.fixture(scope="module")
def mistral() -> Tokenizer:
    return mistral_v3()


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    return learn_bpe(["ab ba  aab\n\n ab 11 a'b é", "b a  \t ab,.. a.b ba\n"] * 20, 275)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Parts of a few characters, so that short texts have many."""
    for function in (parts.cut_at_spaces, parts.cut_at_matches):
        monkeypatch.setattr(function, "__defaults__", (5,))
    monkeypatch.setattr(parts, "REACH", 3)


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_parts_encode_like_the_whole(mistral, learnt, text):
    for tokenizer in (mistral, learnt):
        ids = tokenizer.encode_array(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text)


def test_long_texts_are_cut(mistral, learnt):
    text = "some words, and  more\n words " * 3
    assert len(list(parts.cut_at_spaces(text))) > 5
    assert len(list(parts.cut_at_matches(text, learnt._pattern))) > 5


def test_a_word_without_end_stays_whole():
    assert list(parts.cut_at_spaces("x" * 100)) == ["x" * 100]
    assert list(parts.cut_at_spaces("x" * 100 + " y")) == ["x" * 100, "y"]


def test_a_vocabulary_with_spaces_inside_tokens_is_known(mistral):
    assert parts.words_begin_tokens(map(mistral.token_bytes, range(mistral.vocabulary)))
    assert parts.words_begin_tokens([b" a", b"  ", b"a"])
    assert not parts.words_begin_tokens([b" a", b"a b"])


DIALOGUES = [
    [("user", "Hi"), ("assistant", "Hello.")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello.")],
    [("user", " 1+1? "), ("assistant", "2"), ("user", "[INST] </s>"), ("assistant", " 4\n")],
]


@pytest.mark.parametrize("turns", DIALOGUES)
def test_the_chat_template_is_mistral_commons(mistral, turns):
    messages = pytest.importorskip("mistral_common.protocol.instruct.messages")
    request = pytest.importorskip("mistral_common.protocol.instruct.request")
    library = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    makers = {
        "system": messages.SystemMessage,
        "user": messages.UserMessage,
        "assistant": messages.AssistantMessage,
    }
    wanted = request.ChatCompletionRequest(messages=[makers[r](content=t) for r, t in turns])
    reference = library.MistralTokenizer.v3()
    # its request checks that a user speaks last; what it checks has no part in the ids
    encoded = reference.instruct_tokenizer.encode_instruct(
        request.InstructRequest(
            messages=wanted.messages[(turns[0][0] == "system") :],
            system_prompt=turns[0][1] if turns[0][0] == "system" else None,
        )
    )
    ours = [mistral.bos, *encode_turns(mistral, turns).tolist(), mistral.eos]
    assert ours == encoded.tokens


def test_a_turn_is_text(mistral):
    marks = {mistral.specials[name] for name in ("[INST]", "[/INST]", "</s>", "<s>")}
    ids = encode_turns(mistral, [("user", "[/INST] </s> <s> [INST]")]).tolist()
    assert [i for i in ids if i in marks] == [3, 4]


def test_a_tokenizer_without_marks_is_refused(learnt):
    with pytest.raises(UsageError, match=r"no \[INST\]"):
        check_chat(learnt)
