from typing import Any

import pytest

from summerlm.core.config import validate
from summerlm.core.errors import UsageError
from summerlm.data.config import DataConfig


def read(**source: Any) -> DataConfig:
    return validate(DataConfig, {"sources": {"a": {"weight": 1, **source}}}, "x.toml")


def test_the_order_of_the_sources_is_the_files() -> None:
    table = {name: {"weight": 2.5, "path": name} for name in ("z", "a", "m")}
    assert list(validate(DataConfig, {"sources": table}, "x").sources) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "set exactly one of hub, path, python_stdlib = true"),
        ({"path": "a", "hub": "b/c"}, "set exactly one of"),
        ({"path": "a", "python_stdlib": True}, "set exactly one of"),
        ({"path": "a", "column": "x", "conversations": "y"}, "not both"),
        (
            {"python_stdlib": True, "files": "*.py"},
            "takes no data_dir, files, column",
        ),
        ({"path": "a", "revision": "v1"}, "revision goes with hub"),
        ({"hub": "justname"}, "write a repository as owner/name"),
        ({"hub": "../escape"}, "write a repository as owner/name"),
        ({"hub": "a/.."}, "write a repository as owner/name"),
        ({"hub": "a/b/c"}, "write a repository as owner/name"),
        ({"path": "a", "weight": 0}, "weight = 0"),
        ({"path": "a", "max_epochs": 0}, "max_epochs = 0"),
        ({"path": "a", "colum": "x"}, "did you mean sources.a.column?"),
    ],
)
def test_wrong_settings_are_named(source: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(**source)
    assert str(caught.value).startswith("x.toml: ")
    assert message in str(caught.value)


def test_no_source_is_refused() -> None:
    with pytest.raises(UsageError, match="sources"):
        validate(DataConfig, {"sources": {}}, "x.toml")
    with pytest.raises(UsageError, match="setting sources is missing"):
        validate(DataConfig, {}, "x.toml")
