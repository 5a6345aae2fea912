"""Epochs predicted before step 1, held against what training reads."""

import pytest

from summerlm.core.errors import UsageError
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.data.forecast import check_epochs, predicted_epochs
from summerlm.recipes.data.locking import open_data
from summerlm.recipes.data.probing import probe
from summerlm.recipes.settings import Settings
from summerlm.tokenizer.registry import load_tokenizer


def change(settings, **changes):
    """Settings with `section__key=value` changed."""
    plain = settings.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        plain[section][name] = value
    return Settings.model_validate(plain)


@pytest.fixture
def limited(tiny_settings):
    """The tiny run, its source limited to one epoch."""
    source = tiny_settings.data.model_dump()["sources"]["text"] | {"max_epochs": 1}
    return change(tiny_settings, data__sources={"text": source})


def epoch_tokens(settings):
    (source,) = open_data(settings, write=False)
    tokenizer = load_tokenizer(settings.tokenizer.name)
    texts = (text for unit in range(len(source.units)) for text in source.read(unit))
    return sum(len(tokenizer.encode(text)) + 2 for text in texts)


def judge(settings, share_of_epoch):
    """`check_epochs` at a budget of so much of the source's one epoch."""
    budget = round(epoch_tokens(settings) * share_of_epoch)
    settings = change(settings, train__budget_tokens=budget)
    sources = open_data(settings, write=False)
    return check_epochs(settings, sources, load_tokenizer(settings.tokenizer.name))


def test_little_is_fine_near_is_told_beyond_is_refused(limited):
    assert judge(limited, 0.8) == []
    for near in (0.95, 1.05):
        (line,) = judge(limited, near)
        assert "source text" in line
        assert "max_epochs = 1" in line
    with pytest.raises(UsageError, match=r"source text: about 1\.2\d* epochs.*max_epochs = 1"):
        judge(limited, 1.25)


def test_weights_share_the_budget(limited):
    sources = limited.data.model_dump()["sources"]
    sources = {"text": sources["text"], "more": sources["text"] | {"weight": 3}}
    two = change(limited, data__sources=sources, train__budget_tokens=40_960)
    assert predicted_epochs(two, "text", 10_240) == pytest.approx(1.0)
    assert predicted_epochs(two, "more", 10_240) == pytest.approx(3.0)


def test_a_source_without_limit_is_not_read(tiny_settings, monkeypatch):
    sources = open_data(tiny_settings, write=False)
    monkeypatch.setattr(type(sources[0]), "read", lambda *_: pytest.fail("was read"))
    assert check_epochs(tiny_settings, sources, load_tokenizer(tiny_settings.tokenizer.name)) == []


def test_training_uses_the_epoch_up_where_it_was_predicted(limited):
    one_lane = change(limited, data__lanes=1, data__open_documents=1, train__batch_tokens=32)
    sources = open_data(one_lane, write=False)
    tokenizer = load_tokenizer(one_lane.tokenizer.name)
    predicted = probe(sources[0], tokenizer, 1000).source_tokens
    loader = open_loader(one_lane, sources, tokenizer, None, workers=0)
    steps = []
    with pytest.raises(UsageError, match="max_epochs = 1 is used up"):
        steps.extend(step.number for step in loader)
    assert predicted - 64 <= 32 * len(steps) <= predicted
