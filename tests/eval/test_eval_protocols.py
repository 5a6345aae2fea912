"""Perplexity under every protocol: each against a plain account of what its source does."""

import math
import re
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn

from summerlm.core.errors import SummerError, UsageError
from summerlm.eval import plans
from summerlm.eval.bootstrap import bootstrap
from summerlm.eval.corpus import Corpus
from summerlm.eval.plans import FIGURES, PROTOCOLS
from summerlm.eval.protocols import measure_protocols
from summerlm.eval.text import measure
from summerlm.eval.wikitext import count_words, detokenize, page_of, read_articles, rows_of
from summerlm.tokenizer.learn import learn_bpe

CONTEXT = 16
ROWS = [
    "",
    " = Sun = \n",
    "",
    " x \n",
    ' The sun is a " star " , 4 @.@ 6 billion years old ( about ) . It \'s hot @-@ white . \n',
    " It has 99 @,@ 8 % of the mass ; the rest : planets . \n",
    "",
    " = = Age = = \n",
    "",
    " Nobody ' s sure , but <unk> says : 4 600 000 000 ! \n",
    " = Moon = \n",
    "",
    " The moon turns round the earth . It shows one face . Grüße , 月 . \n",
    "",
    " = Ö = \n",
    "",
    " x \n",
    "",
]


class Recurrent(nn.Module):
    """A causal model that hears every position of its window, and drops out in training."""

    def __init__(self, vocabulary, context=CONTEXT, width=12):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(context=context, vocabulary=vocabulary)
        self.embedding = nn.Embedding(vocabulary, width)
        self.layer = nn.GRU(width, width, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, vocabulary)
        self.read = []  # shapes of all that was read

    def forward(self, tokens):
        self.read.append(tuple(tokens.shape))
        return self.dropout(self.layer(self.embedding(tokens))[0])

    def logits(self, hidden):
        return 3 * self.head(hidden).float()


class Constant(nn.Module):
    """A model that says the same of every position."""

    def __init__(self, logits, context=CONTEXT):
        super().__init__()
        self.config = SimpleNamespace(context=context, vocabulary=len(logits))
        self.bias = nn.Parameter(logits)

    def forward(self, tokens):
        return torch.zeros(*tokens.shape, 1)

    def logits(self, hidden):
        return self.bias.expand(*hidden.shape[:-1], -1)


def together(model, tokenizer):
    return SimpleNamespace(model=model, tokenizer=tokenizer, config=model.config)


@pytest.fixture(scope="module")
def tokenizer():
    return learn_bpe(["".join(ROWS) * 3], 330)


@pytest.fixture(scope="module")
def lm(tokenizer):
    return together(Recurrent(tokenizer.vocabulary), tokenizer)


@pytest.fixture(scope="module")
def corpus():
    return Corpus.of_rows("wikitext", ROWS)


def nats_of(lm, ids):
    """Nats of each id of a window but the first, read by itself."""
    lm.model.eval()
    with torch.no_grad():
        logits = lm.model.logits(lm.model(torch.tensor([ids[:-1]]))[0]).double()
    return -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


# each protocol as its source writes it


def as_the_original(lm, rows, block, batch=8):
    encoded = [lm.tokenizer.encode(row.strip()) for row in rows]
    encoded = [ids for ids in encoded if len(ids) > 1]
    found = []
    for i in range(0, len(encoded), 1000):
        ids = list(chain(*encoded[i : i + 1000]))
        whole = len(ids) // block * block
        found += [ids[j : j + block] for j in range(0, whole, block)]
    losses = []
    for i in range(0, len(found), batch):  # its loss is a mean over the batch's tokens
        losses.append(torch.cat([nats_of(lm, ids) for ids in found[i : i + batch]]).mean().item())
    return math.exp(sum(losses) / len(losses)), len(found) * (block - 1)


def as_hugging_face(lm, text, length, stride):
    ids = [lm.tokenizer.bos, *lm.tokenizer.encode(text)]
    nats, tokens, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        labels = ids[begin:end]
        labels = [-100] * (len(labels) - (end - before)) + labels[len(labels) - (end - before) :]
        for nat, label in zip(nats_of(lm, ids[begin:end]), labels[1:], strict=True):
            nats, tokens = nats + (nat.item() if label != -100 else 0), tokens + (label != -100)
        before = end
        if end == len(ids):
            break
    return math.exp(nats / tokens), tokens


def as_lm_eval(lm, pages, length):
    nats = words = size = 0
    for page in pages:
        ids, done = lm.tokenizer.encode(detokenize(page)), 0
        while done < len(ids):
            new = min(len(ids) - done, length)
            read = ([lm.tokenizer.bos, *ids])[: done + new + 1][-length - 1 :]
            nats += nats_of(lm, read)[-new:].sum().item()
            done += new
        words += len(re.split(r"\s+", page))
        size += len(page.encode())
    return math.exp(nats / words), math.exp(nats / size), nats / size / math.log(2), words, size


def test_the_originals(lm, corpus):
    score = measure_protocols(lm, corpus)["original"]
    perplexity, tokens = as_the_original(lm, ROWS, CONTEXT)
    assert score.figures["perplexity"].value == pytest.approx(perplexity, rel=1e-6)
    assert score.n == {"blocks": tokens // (CONTEXT - 1), "tokens": tokens}
    assert "2048" in score.notes[0]


def test_the_originals_tail_is_dropped_every_1000_rows(lm):
    rows = [f" {number} and {number * 7} \n" for number in range(2100)]
    corpus = Corpus.of_rows("documents", rows)
    lm = together(Recurrent(lm.tokenizer.vocabulary, 64), lm.tokenizer)
    score = measure_protocols(lm, corpus)["original"]
    perplexity, tokens = as_the_original(lm, rows, 64)
    assert score.n["tokens"] == tokens
    assert score.figures["perplexity"].value == pytest.approx(perplexity, rel=1e-6)
    whole = sum(len(ids) for ids in lm.tokenizer.encode_batch([row.strip() for row in rows]))
    assert score.n["blocks"] < whole // 64  # three tails


def test_the_originals_blocks_are_of_2048_where_the_model_reads_more(tokenizer, monkeypatch):
    monkeypatch.setattr(plans, "ORIGINAL_BLOCK", 8)
    lm = together(Recurrent(tokenizer.vocabulary), tokenizer)
    score = measure_protocols(lm, Corpus.of_rows("wikitext", ROWS))["original"]
    assert score.settings["block"] == 8
    assert score.figures["perplexity"].value == pytest.approx(as_the_original(lm, ROWS, 8)[0])


@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16])
def test_the_sliding_window(lm, corpus, stride):
    score = measure_protocols(lm, corpus, stride=stride)["sliding"]
    text = "\n\n".join(ROWS[1:])  # what stands before the first heading belongs to no article
    perplexity, tokens = as_hugging_face(lm, text, CONTEXT, stride)
    assert score.figures["perplexity"].value == pytest.approx(perplexity, rel=1e-6)
    assert score.n == {"documents": 3, "tokens": tokens}
    assert score.settings["stride"] == stride


def test_lm_evals(lm, corpus):
    score = measure_protocols(lm, corpus, stride=3)["rolling"]
    *expected, words, size = as_lm_eval(lm, corpus.documents, CONTEXT)
    assert [figure.value for figure in score.figures.values()] == pytest.approx(expected, rel=1e-6)
    assert list(score.figures) == ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    tokens = sum(map(len, lm.tokenizer.encode_batch([detokenize(p) for p in corpus.documents])))
    assert score.n == {"documents": 3, "tokens": tokens, "words": words, "bytes": size}
    assert score.settings["stride"] == CONTEXT


@pytest.mark.parametrize("stride", [None, 5, 16])
def test_raw_text_is_what_measure_says(lm, corpus, stride):
    score = measure_protocols(lm, corpus, stride=stride)["raw"]
    expected = measure(
        lm.model, lm.tokenizer, corpus.documents, context=CONTEXT, stride=stride or CONTEXT
    )
    assert score.figures["bits_per_byte"].value == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert score.figures["perplexity"].value == pytest.approx(expected.perplexity, rel=1e-6)
    assert score.n == {
        "documents": 3,
        "tokens": expected.tokens,
        "bytes": sum(len(page.encode()) for page in corpus.documents),
    }


# what must come out whatever the text


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_uniform_model_is_left_with_the_whole_vocabulary(tokenizer, corpus, protocol):
    lm = together(Constant(torch.zeros(tokenizer.vocabulary)), tokenizer)
    score = measure_protocols(lm, corpus)[protocol]
    nats = math.log(tokenizer.vocabulary) * score.n["tokens"]
    for name, figure in score.figures.items():
        unit = {"perplexity": "tokens", "word_perplexity": "words"}.get(name, "bytes")
        expected = nats / score.n[unit]
        expected = expected / math.log(2) if name == "bits_per_byte" else math.exp(expected)
        assert figure.value == pytest.approx(expected, rel=1e-6)
    if "perplexity" in score.figures:
        perplexity = score.figures["perplexity"]
        assert perplexity.value == pytest.approx(tokenizer.vocabulary, rel=1e-6)
        assert perplexity.error == pytest.approx(0, abs=1e-3)


def test_a_uniform_model_over_bytes_takes_eight_bits_each():
    tokenizer = learn_bpe([], 263)  # no merges: an id a byte, and seven that stand for none
    logits = torch.zeros(263)
    logits[list(tokenizer.specials.values())] = -math.inf
    lm = together(Constant(logits), tokenizer)
    scores = measure_protocols(lm, Corpus.of_documents(["Grüße, 月 und", "a b " * 30]))
    assert scores["raw"].figures["bits_per_byte"].value == pytest.approx(8, rel=1e-6)
    assert scores["rolling"].figures["bits_per_byte"].value == pytest.approx(8, rel=1e-6)
    assert scores["rolling"].figures["byte_perplexity"].value == pytest.approx(256, rel=1e-6)


def test_a_unigram_model_is_left_with_the_texts_entropy():
    tokenizer = learn_bpe([], 263)
    (a,), (b,) = tokenizer.encode_batch(["a", "b"])
    logits = torch.full((263,), -math.inf)
    logits[[a, b]] = torch.tensor([0.75, 0.25]).log()
    lm = together(Constant(logits, context=5), tokenizer)
    corpus = Corpus(["aaab" * 8] * 5, [["aaab" * 8]] * 5)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    scores = measure_protocols(lm, corpus)
    assert scores["raw"].figures["perplexity"].value == pytest.approx(math.exp(entropy))
    assert scores["raw"].figures["bits_per_byte"].value == pytest.approx(entropy / math.log(2))
    # of a block of five the first isn't asked for: of 20 tokens 12 a and 4 b, as in the whole
    assert scores["original"].figures["perplexity"].value == pytest.approx(math.exp(entropy))
    assert scores["sliding"].figures["perplexity"].value == math.inf  # line ends were never seen


# one pass


def test_what_protocols_share_is_read_once(tokenizer):
    lm = together(Recurrent(tokenizer.vocabulary), tokenizer)
    corpus = Corpus.of_documents(["The sun is a star, it is hot." * 4, "It shines.", "x" * 40])
    scores = measure_protocols(lm, corpus, stride=8, batch_tokens=CONTEXT)
    read = [score.settings["read"] for score in scores.values()]
    alone = [score.settings["alone"] for score in scores.values()]
    assert sum(rows * length for rows, length in lm.model.read) == sum(read)
    assert read[:3] == alone[:3]
    assert 0 < read[3] < alone[3]  # what "raw" shares with "rolling": whole windows
    whole = measure_protocols(lm, corpus)
    assert whole["raw"].settings["read"] == 0  # by default all that "rolling" reads
    assert whole["raw"].settings["alone"] == whole["rolling"].settings["read"]
    short = measure_protocols(lm, Corpus.of_documents(["It shines."]))
    assert [short[name].settings["read"] > 0 for name in PROTOCOLS] == [False, True, False, False]


@pytest.mark.parametrize("stride", [3, 8])
def test_windows_that_are_shared_answer_each_protocol(lm, stride):
    """One document, which sliding, rolling and raw all read from the same beginning."""
    text = "The sun is a star, it is hot-white. " * 5
    scores = measure_protocols(lm, Corpus.of_documents([text]), stride=stride)
    assert scores["raw"].settings["read"] < scores["raw"].settings["alone"]
    values = {name: next(iter(score.figures.values())).value for name, score in scores.items()}
    assert values["sliding"] == pytest.approx(as_hugging_face(lm, text, CONTEXT, stride)[0])
    assert values["rolling"] == pytest.approx(as_lm_eval(lm, [text], CONTEXT)[0], rel=1e-5)
    own = measure(lm.model, lm.tokenizer, [text], context=CONTEXT, stride=stride)
    assert values["raw"] == pytest.approx(own.bits_per_byte, rel=1e-6)


def test_batches_change_nothing(lm, corpus):
    scores = [measure_protocols(lm, corpus, batch_tokens=n) for n in (1, 40, 4096)]
    for name in PROTOCOLS:
        for figure, estimate in scores[0][name].figures.items():
            for other in scores[1:]:
                assert other[name].figures[figure].value == pytest.approx(estimate.value, rel=1e-6)


def test_training_mode_comes_back_and_dropout_is_off(lm, corpus):
    lm.model.train()
    first, second = (measure_protocols(lm, corpus) for _ in range(2))
    assert first == second
    assert lm.model.training
    lm.model.eval()
    assert measure_protocols(lm, corpus) == first
    assert not lm.model.training


def test_nan_is_an_error(tokenizer, corpus):
    logits = torch.full((tokenizer.vocabulary,), math.nan)
    with pytest.raises(SummerError, match="NaN of this text"):
        measure_protocols(together(Constant(logits), tokenizer), corpus)


def shared_scores(ranks, model, tokenizer):
    corpus = Corpus.of_rows("wikitext", ROWS)
    return measure_protocols(together(model, tokenizer), corpus, batch_tokens=20, ranks=ranks)


@pytest.mark.ranks
def test_ranks_that_share_the_work_find_what_one_finds(lm):
    alone = measure_protocols(lm, Corpus.of_rows("wikitext", ROWS), batch_tokens=20)
    found = run_ranks(shared_scores, lm.model, lm.tokenizer, world=3)
    assert found[1:] == found[:-1]
    for name, score in alone.items():
        assert found[0][name].n == score.n
        for figure, estimate in score.figures.items():
            assert found[0][name].figures[figure].value == pytest.approx(estimate.value)


# texts that are odd


def test_a_text_shorter_than_a_block_has_no_figure_of_the_originals(lm):
    scores = measure_protocols(lm, Corpus.of_documents(["The sun"]))
    assert scores["original"].figures == {}
    assert scores["original"].n == {"blocks": 0, "tokens": 0}
    assert "not one block" in scores["original"].notes[-1]
    assert scores["raw"].figures["bits_per_byte"].error is None  # one document can't be resampled


@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
def test_no_text_is_refused(lm, documents):
    with pytest.raises(UsageError, match=f"{len(documents)} documents hold no text"):
        measure_protocols(lm, Corpus.of_documents(documents))


@pytest.mark.parametrize("stride", [0, CONTEXT + 1])
def test_a_stride_that_leaves_tokens_out_is_refused(lm, corpus, stride):
    with pytest.raises(UsageError, match=f"stride {stride}"):
        measure_protocols(lm, corpus, stride=stride)


def test_empty_documents_count_their_word_as_in_lm_eval(lm):
    pages = ["The sun is a star.", "", "It is hot."]
    score = measure_protocols(lm, Corpus.of_documents(pages))["rolling"]
    assert score.n["words"] == 5 + 1 + 3


# the interval


def test_the_bootstrap_finds_the_error_of_a_mean():
    values = np.random.default_rng(1).normal(5, 2, size=400)
    sums = np.stack([values, np.ones(400)], 1)
    found = bootstrap(sums, lambda totals: totals[:, 0] / totals[:, 1], seed=0, resamples=4000)
    expected = values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(expected, rel=0.05)
    assert found.low == pytest.approx(values.mean() - 1.96 * expected, abs=0.02)
    assert found.high == pytest.approx(values.mean() + 1.96 * expected, abs=0.02)


def test_the_interval_is_the_seeds_and_of_documents(lm, corpus):
    first, again, other = (measure_protocols(lm, corpus, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["raw"].figures != other["raw"].figures
    # the same text cut into pieces that differ less has a smaller error
    for name in ("sliding", "rolling", "raw"):
        estimate = next(iter(first[name].figures.values()))
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.error > 0


def test_tokens_of_the_sliding_window_belong_to_their_document(lm):
    """Documents of which one alone is hard: the error is that of drawing it or not."""
    tokenizer = lm.tokenizer
    (a,) = tokenizer.encode("x")
    logits = torch.zeros(tokenizer.vocabulary)
    logits[a] = 2.0
    flat = together(Constant(logits), tokenizer)
    scores = measure_protocols(flat, Corpus.of_documents(["x" * 50, "y" * 50, "x" * 50]))
    sliding, raw = scores["sliding"].figures["perplexity"], scores["raw"].figures["perplexity"]
    assert sliding.error == pytest.approx(raw.error, rel=0.2)


# WikiText


def test_rows_become_the_articles_of_the_document_level_set():
    articles = read_articles(ROWS)
    assert [article[0] for article in articles] == [" = Sun = \n", " = Moon = \n", " = Ö = \n"]
    assert list(chain(*articles)) == ROWS[1:]
    pages = [page_of(article, last=article is articles[-1]) for article in articles]
    assert pages[1].startswith(" = Moon = \n \n The moon")
    assert pages[1].endswith("月 . \n ")  # the line before the next heading, without its end
    assert pages[2] == " = Ö = \n \n x \n \n"  # the file's last line end is the last page's
    assert [rows_of(page) for page in pages] == articles


def test_both_forms_of_wikitext_are_one_corpus(corpus):
    pages = Corpus.of_rows("wikitext_pages", corpus.documents)
    assert pages == corpus


def test_words_are_counted_before_and_bytes_too(corpus):
    page = corpus.documents[0]
    assert count_words(page) == len(page.split()) + 2
    assert count_words(detokenize(page)) != count_words(page)
    assert len(detokenize(page).encode()) != len(page.encode())


def test_the_detokenizer():
    read = detokenize(page_of(ROWS[1:9], last=False))
    assert read.startswith(" = Sun =\n")
    assert 'The sun is a "star", 4.6 billion years old (about).' in read
    assert "hot-white" in read
    assert "99,8 %" in read
    assert "rest: planets" in read
    assert "== Age ==" in read


def test_unknown_words_are_told(lm, corpus):
    assert any("<unk>" in note for note in corpus.notes)
    scores = measure_protocols(lm, corpus)
    assert all("<unk>" in score.notes[-1] for score in scores.values())
    raw = Corpus.of_rows("wikitext", [row.replace("<unk>", "she") for row in ROWS])
    assert raw.notes == ()


def test_a_row_without_text_is_refused_by_its_number():
    with pytest.raises(UsageError, match="row 1"):
        Corpus.of_rows("documents", ["a", None])


def test_every_figure_has_its_divisor():
    totals = np.array([[math.log(16), 2.0, 4.0, 1.0]])
    found = {name: figure.of(totals).item() for name, figure in FIGURES.items()}
    assert found == pytest.approx(
        {"perplexity": 4, "word_perplexity": 2, "byte_perplexity": 16, "bits_per_byte": 4}
    )
