"""Settings: validated, frozen, from TOML files and `section.key=value` overrides.

Flow:
    1. `read_settings` reads a TOML file and the files it `extends`, nearest file first;
    2. lays the overrides of the command line on top;
    3. validates the whole against a `Section` class, naming the nearest key for an unknown one;
    4. the result is frozen and travels through the program; `dump_toml` writes it back.

Precedence, low to high: a field's default, the extended file, the file, the override.
TOML has no null, so the string "none" stands for it, in files and overrides alike.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from summerlm.core.errors import UsageError

NONE = "none"  # how null is written in TOML and on the command line
ALL = "*"  # all entries of a table


class Section(BaseModel):
    """One group of settings; a field's docstring says what it means and in which unit."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


S = TypeVar("S", bound=Section)


def read_settings(schema: type[S], path: Path | None, overrides: Sequence[str] = ()) -> S:
    """Read, merge and validate settings.

    Args:
        schema: The settings class to fill.
        path: A TOML file, or None to start from the defaults.
        overrides: Texts of the form `section.key=value`, the last one winning.

    Returns:
        The validated, frozen settings.

    Raises:
        UsageError: If a file is missing or no TOML, an override has no `=`, a key is unknown,
            or a value has the wrong type or range; the message names the key and where it came
            from: the file or the command line.
    """
    values = _read_file(path, ()) if path is not None else {}
    for text in overrides:
        _apply_override(values, text)
    try:
        return _fill(schema, values)
    except ValidationError as error:
        key, words = _explain(schema, error)
        origin = _blame(key, words, overrides, str(path) if path is not None else "settings")
        raise UsageError(f"{origin}: {words}") from None


def validate(schema: type[S], values: Mapping[str, Any], origin: str) -> S:
    """Check plain values against a settings class.

    Args:
        schema: The settings class to fill.
        values: Nested tables of plain values, as a TOML file holds them.
        origin: Where the values come from, for the error message.

    Returns:
        The validated, frozen settings.

    Raises:
        UsageError: If a key is unknown or a value doesn't fit.
    """
    try:
        return _fill(schema, values)
    except ValidationError as error:
        raise UsageError(f"{origin}: {_explain(schema, error)[1]}") from None


def dump_toml(settings: Section) -> str:
    """Write settings as TOML that `read_settings` reads back to equal settings."""
    return tomli_w.dumps(_denulls(settings.model_dump(mode="json")))


def differences(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
    """Compare two settings of one class.

    Args:
        old: The first settings.
        new: The second settings.

    Returns:
        The dotted keys whose values differ, each with the (old, new) values; None where a key
        is missing on one side.
    """
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def flatten(settings: Section) -> dict[str, Any]:
    """Give settings as one flat table from dotted key to plain value."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            yield prefix, value

    return dict(walk("", settings.model_dump(mode="json")))


def known_keys(schema: type[Section]) -> list[str]:
    """List the dotted keys of a settings class; `*` stands for a name that the user chooses."""

    def walk(prefix: str, annotation: Any) -> Iterator[str]:
        section = _section_of(annotation)
        if section is None:
            yield prefix.removesuffix(".")
            return
        if get_origin(annotation) is dict:
            prefix += "*."
        for name, field in section.model_fields.items():
            yield from walk(f"{prefix}{name}.", field.annotation)

    return list(walk("", schema))


def _section_of(annotation: Any) -> type[Section] | None:
    """Find the section class inside `Section`, `dict[str, Section]` or `Section | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((s for a in get_args(annotation) if (s := _section_of(a)) is not None), None)


def _read_file(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UsageError(f"{path}: `extends` goes round in a circle")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such settings file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: can't be read as TOML: {error}") from None
    base = values.pop("extends", None)
    if base is None:
        return _merge({}, values)
    if not isinstance(base, str):
        raise UsageError(f"{path}: `extends` must be the path of one settings file")
    return _merge(_read_file(path.parent / base, (*seen, path.resolve())), values)


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `top` over `base`, table by table; a value or list replaces the one below it whole.

    "none" for a table takes it away, for instance a source of the extended file; `"*" = "none"`
    in a table takes away all that the extended file has in it.
    """
    merged = {} if top.get(ALL) == NONE else dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, dict):
            merged[key] = _merge(below if isinstance(below, dict) else {}, value)
        elif value == NONE and isinstance(below, dict):
            del merged[key]
        elif (key, value) != (ALL, NONE):
            merged[key] = value
    return merged


def _apply_override(values: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UsageError(f"override {text!r}: write it as section.key=value")
    table = values
    for name in names[:-1]:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise UsageError(f"override {text!r}: {name} is a value, not a section")
        table = inner
    value = _parse_value(raw.strip())
    if (names[-1], value) == (ALL, NONE):
        table.clear()
    elif value == NONE and isinstance(table.get(names[-1]), dict):
        del table[names[-1]]
    else:
        table[names[-1]] = value


def _parse_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw  # a bare word is a string, so that quotes needn't survive the shell


def _nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nulls(inner) for key, inner in value.items()}
    return None if value == NONE else value


def _denulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _denulls(inner) for key, inner in value.items()}
    return NONE if value is None else value


def _fill(schema: type[S], values: Mapping[str, Any]) -> S:
    # JSON mode: strict about types, and yet lists become tuples and strings paths
    return schema.model_validate_json(json.dumps(_nulls(values), default=str))


def _explain(schema: type[Section], error: ValidationError) -> tuple[str, str]:
    """Turn the first of pydantic's errors into its key and one line; misspelt before missing."""
    errors = error.errors()
    first = min(errors, key=lambda found: found["type"] != "extra_forbidden")
    key, annotation = _locate(schema, first["loc"])
    if first["type"] == "extra_forbidden":
        return key, f"no setting {key}{_nearest(schema, key)}"
    if first["type"] == "missing":
        return key, f"setting {key} is missing"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return key, f"{key}: {message}" if key else message
    # an error for each kind of value that was tried
    wanted = [found["msg"] for found in errors if _locate(schema, found["loc"])[0] == key]
    wanted = [message.removeprefix("Input should be ") for message in wanted]
    if NoneType in get_args(annotation):
        wanted.append(repr(NONE))
    return key, f"{key} = {first['input']!r}: should be {', or '.join(wanted)}"


def _locate(schema: type[Section], place: Sequence[int | str]) -> tuple[str, Any]:
    """Give the dotted key that an error's place means, and its annotation, if it has one.

    Where a value may be of several kinds, pydantic adds to the place the one that it tried.
    """
    names: list[str] = []
    annotation: Any = schema
    for part in place:
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        if isinstance(annotation, type) and issubclass(annotation, Section):
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif get_origin(annotation) in (dict, tuple):
            annotation = kinds[-1 if get_origin(annotation) is dict else 0]
        elif len(kinds) > 1:
            break
        names.append(str(part))
    return ".".join(names), annotation


def _blame(key: str, words: str, overrides: Sequence[str], file: str) -> str:
    """Name the place that a mistake in a setting, or in how some go together, comes from."""
    keys = {text: text.partition("=")[0].strip() for text in overrides}
    if any(own == key or key.startswith(f"{own}.") for own in keys.values()):
        return "command line"
    # what is missing, the command line may have made needed
    near = f"{key.rpartition('.')[0]}." if words.endswith(" is missing") else None
    shared = [
        text
        for text, own in keys.items()
        if (near and own.startswith(near)) or re.search(rf"\b{re.escape(own)}\b", words)
    ]
    return f"{file} with {' '.join(shared)}" if shared else file


def _nearest(schema: type[Section], key: str) -> str:
    parts = key.split(".")
    candidates = []
    for known in known_keys(schema):
        names = known.split(".")
        if len(names) == len(parts):  # a user's own name stands where the schema has a star
            names = [p if n == "*" else n for n, p in zip(names, parts, strict=True)]
        candidates.append(".".join(names))
        candidates.append(names[0])
    if close := difflib.get_close_matches(key, candidates, n=1, cutoff=0.6):
        return f"; did you mean {close[0]}?"
    same_leaf = [c for c in candidates if c.rsplit(".", 1)[-1] == parts[-1]]
    return f"; did you mean {same_leaf[0]}?" if same_leaf else ""
