import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn

from summerlm.core.errors import UsageError
from summerlm.eval.text import TextScore, measure
from summerlm.model.config import ModelConfig
from summerlm.model.transformer import Transformer

CONTEXT = 8
TEXTS = ["", "a", "hello", "12345678", "123456789", "ä€😀 und so weiter, noch lange nicht zu Ende"]


class ByteTokenizer:
    """Every byte is a token; id 0 is BOS."""

    bos, vocabulary = 0, 257

    def encode_batch(self, texts):
        return [[byte + 1 for byte in text.encode()] for text in texts]

    def count_bytes(self, ids):
        return len(ids)


class Recurrent(nn.Module):
    """A causal model that hears every position of its window, and drops out in training."""

    def __init__(self, width=12):
        super().__init__()
        self.config = SimpleNamespace(context=CONTEXT)
        self.embedding = nn.Embedding(257, width)
        self.layer = nn.GRU(width, width, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, 257)
        self.widths = []

    def forward(self, tokens):
        self.widths.append(tokens.shape)
        return self.dropout(self.layer(self.embedding(tokens))[0])

    def logits(self, hidden):
        return 3 * self.head(hidden).float()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Recurrent()


def one_at_a_time(model, text, context, stride):
    """Nats of each token, each from a window of its own that ends just before it."""
    model.eval()
    ids = [0, *(byte + 1 for byte in text.encode())]
    nats = []
    for target in range(1, len(ids)):
        start = 0
        if target > context:  # its window ends at the next whole stride, or with the document
            end = context + math.ceil((target - context) / stride) * stride
            start = min(end, len(ids) - 1) - context
        with torch.no_grad():
            hidden = model(torch.tensor([ids[start:target]]))[0, -1]
            nats.append(-model.logits(hidden).double().log_softmax(-1)[ids[target]].item())
    return nats


@pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 1), (8, 8), (8, 3), (5, 2), (1, 1)])
@pytest.mark.parametrize("batch_rows", [1, 3])
def test_equals_one_token_at_a_time(model, context, stride, batch_rows):
    score = measure(
        model, ByteTokenizer(), TEXTS, context=context, stride=stride, batch_rows=batch_rows
    )
    expected = [one_at_a_time(model, t, context, stride or context // 2) for t in TEXTS]
    assert score.nats == pytest.approx(sum(map(sum, expected)), rel=1e-6)
    assert score.tokens == score.bytes == sum(map(len, expected))
    assert score.documents == len(TEXTS)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=12).filter(any),
    st.integers(1, CONTEXT),
    st.integers(1, 4),
    st.data(),
)
def test_batching_and_order_change_nothing(texts, context, batch_rows, data):
    torch.manual_seed(1)
    model, stride = Recurrent(), data.draw(st.integers(1, context))
    together = measure(
        model, ByteTokenizer(), iter(texts), context=context, stride=stride, batch_rows=batch_rows
    )
    alone = [
        measure(model, ByteTokenizer(), [t], context=context, stride=stride, batch_rows=99)
        for t in texts
        if t
    ]
    assert together.nats == pytest.approx(sum(score.nats for score in alone), rel=1e-6)
    assert together.tokens == sum(score.tokens for score in alone)


def test_a_uniform_model_is_left_with_the_whole_vocabulary(model):
    torch.manual_seed(0)
    uniform = Recurrent()
    nn.init.zeros_(uniform.head.weight)
    nn.init.zeros_(uniform.head.bias)
    score = measure(uniform, ByteTokenizer(), TEXTS, context=CONTEXT)
    assert score.loss == pytest.approx(math.log(257), rel=1e-6)
    assert score.perplexity == pytest.approx(257, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)


def test_derived_numbers():
    score = TextScore(nats=20 * math.log(2), tokens=10, bytes=40, documents=2)
    assert score.loss == pytest.approx(2 * math.log(2))
    assert score.perplexity == pytest.approx(4)
    assert score.bits_per_byte == pytest.approx(0.5)
    assert TextScore(nats=1e6, tokens=1, bytes=1, documents=1).perplexity == math.inf


def test_windows_of_equal_length_go_together(model):
    model.widths.clear()
    measure(model, ByteTokenizer(), ["ab", "x" * 40] * 4, context=8, batch_rows=4)
    assert sorted(model.widths) == [(4, 2)] + [(4, 8)] * 9  # no position is padding


def test_training_mode_comes_back_and_dropout_is_off(model):
    model.train()
    first, second = (measure(model, ByteTokenizer(), TEXTS, context=8).nats for _ in range(2))
    assert first == second
    assert model.training
    model.eval()
    assert measure(model, ByteTokenizer(), TEXTS, context=8).nats == first
    assert not model.training


def test_a_character_that_the_vocabulary_writes_as_space_counts_its_own_bytes(model):
    class SpaceTokenizer(ByteTokenizer):
        def encode_batch(self, texts):
            return super().encode_batch([text.replace("\u2581", " ") for text in texts])

    score = measure(model, SpaceTokenizer(), ["a\u2581b"], context=8)
    assert (score.tokens, score.bytes) == (3, 5)


def test_a_tokenizer_that_miscounts_is_found_out(model):
    class Miscounting(ByteTokenizer):
        def count_bytes(self, ids):
            return len(ids) + 1

    with pytest.raises(AssertionError):
        measure(model, Miscounting(), ["abc"], context=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 9}, "context 9"),
        ({"context": 0}, "context 0"),
        ({"context": 8, "stride": 9}, "stride 9"),
        ({"context": 8, "stride": 0}, "stride 0"),
        ({"context": 8, "documents": ["", ""]}, "nothing to measure"),
        ({"context": 8, "documents": []}, "nothing to measure"),
    ],
)
def test_what_makes_no_sense_is_refused(model, arguments, message):
    documents = arguments.pop("documents", TEXTS)
    with pytest.raises(UsageError, match=message):
        measure(model, ByteTokenizer(), documents, **arguments)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_our_own_transformer_in_windows_and_precisions(precision):
    torch.manual_seed(0)
    config = ModelConfig(
        vocabulary=257,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_hidden=64,
        context=8,
    )
    ours = Transformer(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    expected = sum(sum(one_at_a_time(ours, text, 8, 4)) for text in TEXTS)
    score = measure(ours, ByteTokenizer(), TEXTS, context=8, precision=precision)
    assert score.nats == pytest.approx(expected, rel=1e-5 if precision is None else 2e-2)
    if precision is not None:
        assert score.nats != pytest.approx(expected, rel=1e-6)  # autocast did run


def shared_score(ranks, model, texts):
    return measure(model, ByteTokenizer(), texts, context=8, batch_rows=2, ranks=ranks)


@pytest.mark.ranks
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_share_the_work_find_what_one_finds(model, world):
    alone = measure(model, ByteTokenizer(), TEXTS, context=8, batch_rows=2)
    scores = run_ranks(shared_score, model, TEXTS, world=world)
    assert all(score == scores[0] for score in scores)
    assert scores[0].nats == pytest.approx(alone.nats, rel=1e-12)
    assert replace(scores[0], nats=alone.nats) == alone
