import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from summerlm.core.errors import UsageError
from summerlm.eval.ngram import KneserNey


class Slow:
    """Modified Kneser-Ney over dictionaries of tuples, as the paper writes it."""

    def __init__(self, order, sequences, vocabulary):
        self.order, self.vocabulary = order, vocabulary
        raw = defaultdict(int)
        for sequence in sequences:
            stream = ("pad",) * (order - 1) + tuple(sequence)
            for end in range(order, len(stream) + 1):
                raw[stream[end - order : end]] += 1
        self.counts = {order: dict(raw)}
        for n in range(order - 1, 0, -1):
            fronts = defaultdict(set)
            for gram in self.counts[n + 1]:
                fronts[gram[1:]].add(gram[0])
            self.counts[n] = {gram: len(front) for gram, front in fronts.items()}
        self.followers = {n: defaultdict(list) for n in self.counts}
        for n, counts in self.counts.items():
            for gram, count in counts.items():
                self.followers[n][gram[:-1]].append(count)
        self.discounts = {n: self._discounts(list(c.values())) for n, c in self.counts.items()}

    @staticmethod
    def _discounts(counts):
        n1, n2, n3, n4 = (counts.count(k) for k in (1, 2, 3, 4))
        if n1 and n2 and n3 and n4:
            y = n1 / (n1 + 2 * n2)
            found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            if min(found) > 0:
                return found
        return (0.5, 1.0, 1.5)

    def probability(self, context, token):
        return self._interpolated(("pad",) * self.order + tuple(context), token, self.order)

    def _interpolated(self, context, token, n):
        if n == 0:
            return 1 / self.vocabulary
        lower = self._interpolated(context, token, n - 1)
        context = context[len(context) - n + 1 :]
        followers = self.followers[n].get(context)
        if not followers:
            return lower
        discounts, total = self.discounts[n], sum(followers)
        count = self.counts[n].get((*context, token), 0)
        kept = count - discounts[min(count, 3) - 1] if count else 0
        freed = sum(discounts[min(c, 3) - 1] for c in followers)
        return kept / total + freed / total * lower


def zipf(documents, length, vocabulary, seed):
    """Documents with the habits of text: common and rare ids, and repeated phrases."""
    rng = np.random.default_rng(seed)
    phrases = [np.minimum(rng.zipf(1.3, 6), vocabulary) - 1 for _ in range(40)]
    return [
        np.concatenate([phrases[min(i, 39)] for i in rng.zipf(1.2, length // 6)]).tolist()
        for _ in range(documents)
    ]


def compare(order, train, test, vocabulary):
    model, slow = KneserNey(order).fit(train, vocabulary), Slow(order, train, vocabulary)
    for sequence in [*test, *train]:
        expected = [slow.probability(sequence[:i], token) for i, token in enumerate(sequence)]
        np.testing.assert_allclose(model.probabilities(sequence), expected, rtol=1e-10)
        assert model.nats(sequence) == pytest.approx(-sum(map(math.log, expected)))
    return slow


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize(("vocabulary", "length"), [(50, 200), (40_000, 600)])
def test_equals_the_slow_reference(order, vocabulary, length):
    train, test = zipf(12, length, vocabulary, seed=1), zipf(3, 60, vocabulary, seed=2)
    slow = compare(order, train, test, vocabulary)
    if order == 5:  # both ways to discounts are walked: estimated, and fallen back on
        fallen_back = [found == (0.5, 1.0, 1.5) for found in slow.discounts.values()]
        assert any(fallen_back)
        assert not all(fallen_back)


sequences = st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=4)


@given(st.integers(1, 5), sequences.filter(any), sequences)
def test_equals_the_slow_reference_on_anything(order, train, test):
    compare(order, train, test, 5)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_probabilities_sum_to_one(order):
    vocabulary = 60
    train = zipf(8, 150, vocabulary - 5, seed=3)  # five ids never occur
    model = KneserNey(order).fit(train, vocabulary)
    contexts = [[], train[0][:1], train[0][:4], train[1][:20], [vocabulary - 1] * 6]
    contexts += [[*train[2][:9], vocabulary - 2, *train[2][9:12]], train[-1]]
    for context in contexts:
        found = [model.probabilities([*context, token])[-1] for token in range(vocabulary)]
        assert sum(found) == pytest.approx(1, abs=1e-12)
        assert min(found) > 0


def test_a_document_knows_nothing_of_the_one_before():
    train = [[0, 1, 2], [3, 4, 5]]
    model = KneserNey(order=5).fit(train, 8)
    assert np.array_equal(
        model.probabilities([3, 4]), KneserNey(order=5).fit(train[::-1], 8).probabilities([3, 4])
    )
    assert model.probabilities([2, 3])[1] < model.probabilities([3])[0]  # 2 3 was never read


def test_it_learns_what_it_reads():
    text = zipf(1, 3000, 300, seed=4)[0]
    losses = [
        KneserNey(order).fit([text[:2500]], 300).nats(text[2500:]) / 500 for order in (1, 2, 5)
    ]
    assert losses[0] > losses[1] > losses[2]
    assert losses[0] < math.log(300)


def test_nothing_to_count_is_an_error_and_nothing_to_score_is_zero():
    for nothing in ([], [[], []]):
        with pytest.raises(UsageError, match="at least one token"):
            KneserNey().fit(nothing, 10)
    assert KneserNey().fit([[], [1, 2]], 10).nats([]) == 0


@pytest.mark.parametrize("token", [-1, 10])
def test_an_id_outside_the_vocabulary_is_a_bug(token):
    with pytest.raises(AssertionError):
        KneserNey().fit([[1, token]], 10)
    with pytest.raises(AssertionError):
        KneserNey().fit([[1]], 10).nats([token])
