"""The demo, whole, for a few seconds of training."""

import json
import math

import pytest
from rich.console import Console

from summerlm.core.errors import UsageError
from summerlm.data.shards.stdlib import standard_library
from summerlm.recipes.data.batches import open_loader
from summerlm.recipes.demo import demo, demo_settings, documents_seen
from summerlm.recipes.opening import is_finished
from summerlm.recipes.settings import derive
from summerlm.tokenizer.tokenizer import Tokenizer


@pytest.mark.slow
def test_the_demo_measures_what_it_trained(tmp_path):
    folder = tmp_path / "2024"  # a name that TOML would read as a number
    assert demo(folder, 0.1, Console(quiet=True)) == 0
    summary = json.loads((folder / "summary.json").read_text())
    split = standard_library()
    assert summary["held_out_files"] == len(split.held_out)
    assert summary["held_out_bytes"] == sum(len(path.read_bytes()) for path in split.held_out)
    for key in ("bits_per_byte", "baseline_5gram_bits_per_byte", "xz_bits_per_byte"):
        assert 0.5 < summary[key] < 8
    assert summary["tokens_per_second"] == summary["tokens"] / summary["train_seconds"]
    assert [set(row) for row in summary["completions"]] == [{"prompt", "text"}] * 3
    settings = demo_settings(folder, summary["tokens"])
    assert is_finished(settings)
    assert derive(settings).tokens == summary["tokens"]
    page = (folder / "report.html").read_text()
    assert "this model" in page
    assert "xz -9e" in page

    # what the baselines got is what the model got, but for files that hold the same text
    tokenizer = Tokenizer.load(folder / "tokenizer")
    seen = list(documents_seen(settings, tokenizer))
    rows = derive(settings).rows
    loader = open_loader(settings, _sources(settings), tokenizer, None)
    inputs = sum(
        sum(int((row[:-1] > max(tokenizer.bos, tokenizer.eos)).sum()) for row in step.ids)
        for step, _ in zip(loader, range(derive(settings).steps), strict=False)
    )
    assert 0.99 * inputs < sum(map(len, seen)) <= inputs
    assert rows == settings.train.batch_tokens // settings.model.context
    texts = {path.read_text() for path in split.train}
    whole = [tokenizer.decode(ids) for ids in seen]
    assert sum(text in texts for text in whole) > 10  # the others were open when training stopped
    assert all(any(known.startswith(text) for known in texts) for text in whole)
    assert math.isfinite(summary["train_seconds"])
    with pytest.raises(UsageError, match=r"holds a demo of 0\.1 minutes"):
        demo(folder, 0.2, Console(quiet=True))


def _sources(settings):
    from summerlm.data.opening import open_sources

    return open_sources(settings.data, settings.data.lanes)
