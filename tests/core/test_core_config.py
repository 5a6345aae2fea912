from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from summerlm.core.config import (
    Section,
    differences,
    dump_toml,
    known_keys,
    read_settings,
)
from summerlm.core.errors import UsageError


class Optim(Section):
    peak_lr: float = Field(default=0.1, gt=0)
    steps: int = 3
    clip: float | None = None
    names: tuple[str, ...] = ()
    shards: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    again: Literal["some", "full"] | None = None
    every: int | None = Field(default=None, ge=1)


class Source(Section):
    weight: float
    column: str = "text"


class Whole(Section):
    optim: Optim = Optim()
    flag: bool = False
    sources: dict[str, Source] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self):
        if self.flag and self.optim.steps == 7:
            raise ValueError("optim.steps (7) doesn't go with flag")
        return self


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("flag = true\n[optim]\npeak_lr = 2\n[sources.web]\nweight = 1\n")
    return path


def test_precedence_default_extended_file_override(tmp_path, config):
    top = tmp_path / "top.toml"
    top.write_text('extends = "a.toml"\n[optim]\nsteps = 5\nclip = 1.0\n')
    found = read_settings(Whole, top, ["optim.clip=none", "sources.web.weight=3.5"])
    assert found.optim == Optim(peak_lr=2, steps=5, clip=None)
    assert found.flag
    assert found.sources["web"].weight == 3.5


def test_a_star_takes_away_all_entries_of_the_extended_file(tmp_path, config):
    top = tmp_path / "top.toml"
    top.write_text('extends = "a.toml"\n[sources]\n"*" = "none"\nmine = { weight = 2 }\n')
    assert list(read_settings(Whole, top).sources) == ["mine"]
    top.write_text('extends = "a.toml"\n[sources]\nmine = { weight = 2 }\n')
    assert list(read_settings(Whole, top).sources) == ["web", "mine"]
    found = read_settings(Whole, top, ["sources.*=none", "sources.other.weight=1"])
    assert list(found.sources) == ["other"]
    top.write_text('[optim]\npeak_lr = 1\n[sources]\n"*" = "none"\n')  # nothing is extended
    assert read_settings(Whole, top).sources == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.peek_lr=1", "no setting optim.peek_lr; did you mean optim.peak_lr?"),
        ("peak_lr=1", "no setting peak_lr; did you mean optim.peak_lr?"),
        ("sources.web.weigth=1", "did you mean sources.web.weight?"),
        ("optin.steps=1", "no setting optin"),
        ("optim.steps=2.5", "optim.steps = 2.5"),
        ("optim.steps=true", "optim.steps = True"),
        ("optim.steps=many", "optim.steps = 'many'"),
        ("optim.peak_lr=0", "optim.peak_lr = 0"),
        ("optim.peak_lr=nan", "optim.peak_lr"),
        ("optim.peak_lr=inf", "optim.peak_lr"),
        ("optim.steps", "write it as section.key=value"),
        ("flag.deeper=1", "flag is a value"),
        ("optim=3", "optim = 3"),
        ("sources.books.column=x", "sources.books.weight is missing"),
        ("optim.steps=7", "doesn't go with flag"),
    ],
)
def test_mistakes_name_the_key(config, override, words):
    with pytest.raises(UsageError) as error:
        read_settings(Whole, config, [override])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.shards=0", "optim.shards = 0: should be greater than or equal to 1, or 'all'"),
        ("optim.shards=some", "optim.shards = 'some': should be a valid integer, or 'all'"),
        ("optim.again=x", "optim.again = 'x': should be 'some' or 'full', or 'none'"),
        ("optim.every=0", "optim.every = 0: should be greater than or equal to 1, or 'none'"),
        ("optim.names=[1]", "optim.names.0 = 1: should be a valid string"),
        ("optim.peek_lr=1", "no setting optim.peek_lr; did you mean optim.peak_lr?"),
        ("sources.web={weight='x'}", "sources.web.weight = 'x': should be a valid number"),
    ],
    ids=lambda value: value.partition("=")[0],
)
def test_a_mistake_on_the_command_line_is_not_the_file_s(config, override, words):
    """All that a setting may be is said, in words of settings."""
    with pytest.raises(UsageError) as error:
        read_settings(Whole, config, ["optim.clip=1", override])
    assert str(error.value) == f"command line: {words}"


def test_a_mistake_of_file_or_of_both_names_them(tmp_path, config):
    def words(*overrides):
        with pytest.raises(UsageError) as error:
            read_settings(Whole, config, list(overrides))
        return str(error.value)

    missing = "sources.books.column=x"
    assert words(missing) == f"{config} with {missing}: setting sources.books.weight is missing"
    both = words("optim.clip=1", "optim.steps=7")
    assert both == f"{config} with optim.steps=7: optim.steps (7) doesn't go with flag"
    config.write_text("[optim]\nsteps = 1.5\n")
    assert words("optim.clip=1").startswith(f"{config}: optim.steps = 1.5: ")


def test_files_that_cannot_be_read(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("flag = \n")
    circle = tmp_path / "circle.toml"
    circle.write_text('extends = "circle.toml"\n')
    for path, words in [
        (tmp_path / "gone.toml", "no such settings file"),
        (broken, "TOML"),
        (circle, "circle"),
    ]:
        with pytest.raises(UsageError, match=words) as error:
            read_settings(Whole, path)
        assert path.name in str(error.value)


def test_settings_are_frozen(config):
    with pytest.raises(Exception, match="frozen"):
        read_settings(Whole, config).optim.steps = 4


@given(
    st.builds(
        Optim,
        peak_lr=st.floats(min_value=1e-300, max_value=1e300),
        steps=st.integers(-(2**60), 2**60),
        clip=st.none() | st.floats(-1e9, 1e9),
        names=st.lists(
            st.text(st.characters(exclude_categories=["Cs"])).filter(lambda s: s != "none")
        ).map(tuple),
    )
)
def test_toml_round_trip(tmp_path_factory, optim):
    path = tmp_path_factory.mktemp("toml") / "x.toml"
    whole = Whole(optim=optim, sources={"a b.c": Source(weight=1)})
    path.write_text(dump_toml(whole), encoding="utf-8")
    assert read_settings(Whole, path) == whole


def test_differences_and_keys():
    old, new = Whole(), Whole(optim=Optim(steps=4), sources={"web": Source(weight=1)})
    assert differences(old, new)["optim.steps"] == (3, 4)
    assert "sources.web.weight" in differences(old, new)
    assert not differences(old, Whole())
    assert "sources.*.column" in known_keys(Whole)
