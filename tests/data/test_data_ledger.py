"""The ledger: its sums are those of the tokens trained, over resumes as well."""

import json

import numpy as np
import pytest
from data_streams import EOS, FIRST, make_loader, make_source, take
from hypothesis import given, settings
from hypothesis import strategies as st

from summerlm.data.ledger import Counts, Ledger


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 1 << 32))
def test_sums_exactly_to_what_was_trained_over_a_resume(first, second, seed):
    sources = [make_source("a", [5, 0, 3] * 8, empty=2), make_source("b", [4] * 20)]
    settings = {"seed": seed, "context": 19}
    steps = take(make_loader(sources, [2.0, 1.0], **settings), first)
    ledger = Ledger("ab")
    for step in steps:
        ledger.add(step.source_counts)
    ledger = Ledger("ab", json.loads(json.dumps(ledger.state())))
    loader = make_loader(sources, [2.0, 1.0], state=steps[-1].state, **settings)
    steps += take(loader, second)
    for step in steps[first:]:
        ledger.add(step.source_counts)

    assert ledger.tokens == len(steps) * 12 * 19
    report = ledger.report()
    assert report["tokens"] == ledger.tokens
    for index, name in enumerate("ab"):
        targets = np.concatenate([s.ids[s.batch.sources.numpy() == index, 1:] for s in steps])
        sums = report["sources"][name]
        assert sums["targets"] == targets.size
        assert sums["documents"] == (targets == EOS).sum()
        assert sums["bytes"] == (targets >= FIRST).sum()
        assert sums["share"] == targets.size / ledger.tokens
        lanes = steps[-1].state["lanes"].values()
        assert sums["epochs"] == 1 + max(p[0] for lane in lanes for p in lane["places"][index])
    whole = Ledger("ab")
    for step in take(make_loader(sources, [2.0, 1.0], **settings), len(steps)):
        whole.add(step.source_counts)
    assert whole.state() == ledger.state()


def test_rows_without_text_are_counted_once():
    source = make_source("a", [4] * 12, empty=3)
    texts = [text for unit in source.data for text in unit]
    empty = texts.count("")
    kept = sum(isinstance(source.clean(text).text, str) for text in texts)
    ledger = Ledger("a")
    for step in make_loader([source], [1.0], lanes=1, rows=1, context=8):
        if step.source_counts["a"].epochs > 1:
            break
        ledger.add(step.source_counts)
    dropped = ledger.state()["a"]["dropped"]
    assert empty - 4 <= dropped["empty or white space only"] <= empty
    assert dropped["shouting"] <= 48 - empty - kept
    assert kept - 1 <= ledger.state()["a"]["documents"] <= kept


def test_a_source_that_gave_nothing_yet_has_a_line():
    report = Ledger(["web"]).report()
    assert report["tokens"] == 0
    assert not any(report["sources"]["web"].values())


def test_counts_add_up_but_for_epochs():
    a = Counts(1, 2, 3, 5, {"empty": 1, "words": 2}, {"emails": 4})
    b = Counts(10, 20, 30, 2, {"words": 3}, {"secrets": 1})
    assert a + b == Counts(11, 22, 33, 5, {"empty": 1, "words": 5}, {"emails": 4, "secrets": 1})
    with pytest.raises(KeyError):
        Ledger("a").add({"b": a})
