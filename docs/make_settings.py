"""Write docs/settings.md from the settings classes: `python docs/make_settings.py`.

Names, types, limits, defaults and sentences are read from the code, so that the page can't say
anything else; tests/test_docs.py fails when the page is not what this makes.
"""

import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo

from summerlm.core.config import Section
from summerlm.recipes.settings import Settings

PAGE = Path(__file__).parent / "settings.md"
NAME = "NAME"  # stands for a key that the user chooses

HEAD = """\
# Settings

Made by `python docs/make_settings.py` from the settings classes; change those, not this page.

A run's settings are a TOML file with a table a section, given to `summerlm train CONFIG`.
Low to high:

- the defaults below;
- a file that the file names to start from: `extends = "15m.toml"`, relative to itself;
- the file;
- the command line: `summerlm train CONFIG train.budget_tokens=2000000`.

Tables are merged key by key, lists are replaced whole. TOML has no null: `"none"` stands for it.
`"none"` for a table takes it away; `"*" = "none"` in a table, all that the extended file has in it.
`summerlm train CONFIG --show` prints what a file comes to. Which settings an existing run may
change: [architecture.md](architecture.md#resuming-and-extending).
"""

WORDS = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
}
LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def page() -> str:
    """Make the whole page."""
    return HEAD + "".join(tables("", Settings))


def tables(prefix: str, section: type[Section]) -> Iterator[str]:
    """Give the tables of a section: its own settings, then those of the sections in it."""
    rows = []
    inner: list[str] = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        annotation = field.annotation
        if get_origin(annotation) is dict:
            key, annotation = f"{key}.{NAME}", get_args(annotation)[1]
        if isinstance(annotation, type) and issubclass(annotation, Section):
            inner += tables(f"{key}.", annotation)
        else:
            meaning = " ".join((field.description or "").split())
            rows.append((f"`{key}`", kind(field), default(field), meaning))
    if rows:
        yield f"\n## {prefix.removesuffix('.')}\n\n{inspect.getdoc(section)}\n\n"
        yield "| setting | value | default | meaning |\n|---|---|---|---|\n"
        for row in rows:
            yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n"
    yield from inner


def kind(field: FieldInfo) -> str:
    """Say which values a setting takes."""
    words, limits = _kind(field.annotation, list(field.metadata))
    return " ".join([words, *limits])


def _kind(annotation: Any, metadata: list[Any]) -> tuple[str, list[str]]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        first, *others = (argument for argument in arguments if argument is not types.NoneType)
        words, limits = _kind(first, metadata)
        words = " or ".join([" ".join([words, *limits]), *(_kind(o, [])[0] for o in others)])
        return f"none or {words}" if types.NoneType in arguments else words, []
    if origin is Annotated:
        inner = [limit for extra in arguments[1:] for limit in getattr(extra, "metadata", [extra])]
        return _kind(arguments[0], [*inner, *metadata])
    if origin is Literal:
        *first, last = (f'`"{value}"`' for value in arguments)
        return f"{', '.join(first)} or {last}" if first else last, []
    if origin is tuple:
        return f"list of {_kind(arguments[0], [])[0]}s", []
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in metadata
        for name, sign in LIMITS.items()
        if hasattr(limit, name)
    ]
    return WORDS[annotation], [", ".join(limits)] if limits else []


def default(field: FieldInfo) -> str:
    """Write a setting's default as a TOML file would."""
    if field.is_required():
        return "required"
    value = "none" if field.default is None else field.default
    if isinstance(value, Path):
        value = str(value)
    text = tomli_w.dumps({"x": list(value) if isinstance(value, tuple) else value})
    return f"`{text.removeprefix('x = ').strip()}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
