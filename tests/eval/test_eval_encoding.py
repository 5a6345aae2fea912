"""Contexts and continuations as ids, by lm-eval's rule."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.core.errors import UsageError
from summerlm.eval.encoding import encode_pair, encode_pairs
from summerlm.eval.likelihood import Ask
from summerlm.tokenizer.learn import learn_bpe
from summerlm.tokenizer.mistral import mistral_v3

BYTES = learn_bpe(["the cat sat on the mat, and the dog sat on the cat. " * 20], 280)
TOKENIZERS = {"bytes": BYTES, "mistral": mistral_v3()}


def rule(tokenizer, context, continuation):
    """The rule, one step a line."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole = [tokenizer.bos, *tokenizer.encode(context + continuation)]
    first = [tokenizer.bos, *tokenizer.encode(context)]
    return tuple(first), tuple(whole[len(first) :])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab \n.é", max_size=8), st.text("ab \n.é", min_size=1, max_size=6)),
        min_size=1,
        max_size=5,
    )
)
def test_is_the_rule_for_many_at_once(name, pairs):
    tokenizer = TOKENIZERS[name]
    expected = [rule(tokenizer, *pair) for pair in pairs]
    if all(continuation for _, continuation in expected):
        assert encode_pairs(tokenizer, pairs) == [Ask(*ids) for ids in expected]
    else:
        with pytest.raises(UsageError, match="no token of its own"):
            encode_pairs(tokenizer, pairs)


@pytest.mark.parametrize(
    ("context", "continuation", "texts"),
    [
        ("the cat", " sat", ("the cat", " sat")),
        ("the cat ", "sat", ("the cat", " sat")),
        ("the cat \n", "sat", ("the cat", " \nsat")),
        ("", "the", ("", "the")),
        ("  ", "the", ("", "  the")),
    ],
)
def test_white_space_at_the_end_goes_to_the_continuation(context, continuation, texts):
    ask = encode_pair(BYTES, context, continuation)
    assert ask.context[0] == BYTES.bos
    assert (BYTES.decode(ask.context), BYTES.decode(ask.continuation)) == texts


def test_the_context_keeps_the_ids_that_it_has_alone():
    """Where a token spans both, the whole's ids are cut after as many as the context has."""
    text = "and the dog sat on the mat the cat sat"
    cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
    spanning = next(
        (a, b)
        for a, b in cuts
        if not a.endswith(" ")
        and BYTES.encode(text)[: len(BYTES.encode(a))] != BYTES.encode(a)
        and len(BYTES.encode(text)) > len(BYTES.encode(a))
    )
    ask = encode_pair(BYTES, *spanning)
    assert list(ask.context[1:]) == BYTES.encode(spanning[0])
    assert list(ask.continuation) == BYTES.encode("".join(spanning))[len(ask.context) - 1 :]


def test_what_a_text_spells_is_text():
    ask = encode_pair(BYTES, "<s>", "</s>")
    assert not {*ask.context[1:], *ask.continuation} & set(BYTES.specials.values())


@pytest.mark.parametrize(("context", "continuation"), [("the cat", ""), ("", ""), ("the ca", "t")])
def test_a_continuation_without_a_token_is_refused(context, continuation):
    if continuation and len(BYTES.encode(context + continuation)) > len(BYTES.encode(context)):
        pytest.fail("choose a pair that ends inside of a token")
    with pytest.raises(UsageError, match=r"no token of its own after the context"):
        encode_pair(BYTES, context, continuation)
