"""What the columns of a parquet file may be, and how their values become Python's.

Flow: `parquet` checks each file's schema against the selection, and converts what it reads.
"""

import pyarrow as pa

from summerlm.core.errors import UsageError
from summerlm.data.shards.rows import TURN_KEYS
from summerlm.data.shards.selection import Condition, Selection
from summerlm.data.shards.shard import nearest_first


def check_columns(what: str, schema: pa.Schema, selection: Selection) -> None:
    """Compare a file's columns with what the settings ask for.

    Args:
        what: The file, for messages.
        schema: Its columns.
        selection: What is read of it.

    Raises:
        UsageError: If it lacks a column, or one holds something else.
    """
    name = selection.column
    kind = _field(what, schema, (name,))
    if selection.dialogue and not _is_dialogue(kind):
        raise UsageError(
            f"{what}: column {name!r} is {kind}, not a list of {{from, value}} or "
            "{role, content}; for plain text set `column`"
        )
    if not selection.dialogue and not _is_text(kind):
        hint = "; set `conversations` instead of `column`" if _is_dialogue(kind) else ""
        raise UsageError(f"{what}: column {name!r} is {kind}, not text{hint}")
    for condition in selection.where:
        _check_condition(what, _field(what, schema, condition.path), condition)


def _field(what: str, schema: pa.Schema, path: tuple[str, ...]) -> pa.DataType:
    """Find the type of a column, or of a key below it."""
    kind: pa.DataType = pa.struct(list(schema))
    for depth, key in enumerate(path):
        names = [field.name for field in kind] if pa.types.is_struct(kind) else []
        if key not in names:
            what_key = f"key {key!r} in column {'.'.join(path[:depth])!r}"
            missing = what_key if depth else f"column {key!r}"
            raise UsageError(
                f"{what}: no {missing}; its {'keys' if depth else 'columns'} are: "
                f"{nearest_first(key, names)}"
            )
        if names.count(key) > 1:
            raise UsageError(f"{what}: has {names.count(key)} columns named {key!r}; rename one")
        kind = kind.field(key).type
    return kind


def _check_condition(what: str, kind: pa.DataType, condition: Condition) -> None:
    """Refuse a comparison that no value of the type can pass."""
    numbers = all(value.number is not None for value in condition.values)
    if _is_text(kind):
        ordered = condition.operator not in ("=", "in")
        possible = not (ordered and numbers)
    elif pa.types.is_boolean(kind):
        possible = condition.operator in ("=", "in")
    else:
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        possible = numbers and (number or pa.types.is_decimal(kind))
    if not possible:
        raise UsageError(
            f"{what}: where = {condition.text!r}: {'.'.join(condition.path)} is {kind}, which "
            "can't be compared so"
        )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_dialogue(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    turn = kind.value_type
    fields = {field.name: field.type for field in turn} if pa.types.is_struct(turn) else {}
    return any(all(key in fields and _is_text(fields[key]) for key in keys) for keys in TURN_KEYS)


def with_bytes(kind: pa.DataType) -> pa.DataType:
    """Choose how values are converted: text as bytes, so that bad UTF-8 costs its own row only.

    Args:
        kind: A column's type.

    Returns:
        The type to cast it to; turns of a dialogue come without other fields.
    """
    if _is_text(kind):
        return pa.large_binary()
    if _is_dialogue(kind):
        keys = {key for pair in TURN_KEYS for key in pair}
        fields = [field for field in kind.value_type if field.name in keys]
        return pa.large_list(pa.struct([(f.name, with_bytes(f.type)) for f in fields]))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, with_bytes(field.type)) for field in kind])
    return kind
