"""The structure of the package, held by machine: imports, sizes, settings, names in docs."""

import ast
import re
from pathlib import Path

import pytest

from summerlm.core.config import known_keys
from summerlm.recipes.settings import Settings

PACKAGE = Path(__file__).parent.parent / "summerlm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# station -> the stations it may import; recipes, cli and the package's front may import all
ALLOWED = {
    "core": "",
    "tokenizer": "core",
    "data": "core tokenizer",
    "model": "core",
    "optim": "core",
    "parallel": "core model",
    "checkpoint": "core tokenizer model",
    "train": "core data model optim parallel checkpoint",
    "generate": "core tokenizer model checkpoint",
    "eval": "core tokenizer data model checkpoint generate",
    "plan": "core model",
}
FREE = {"recipes", "__init__", "__main__"}
FREE |= {"cli", "cli_bench", "cli_checkpoint", "cli_data", "cli_eval", "cli_options", "cli_plan"}


def station(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):  # inside functions too
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    here = station(path)
    if here in FREE:
        return
    for line, name in imports(path):
        if name == "summerlm" or name.startswith("summerlm."):
            target = name.split(".")[1] if "." in name else "__init__"
            allowed = {here, *ALLOWED[here].split()}
            assert target in allowed, f"{path}:{line}: {here} may not import {target}"


def test_every_station_is_in_the_table():
    stations = {station(path) for path in MODULES}
    assert stations - FREE == set(ALLOWED)


def test_transformers_stays_outside():
    for path in MODULES:
        assert all(not name.startswith("transformers") for _, name in imports(path)), path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300, "what would make it two ideas?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            module_forward = node.name == "forward" and not node.decorator_list
            limit = 30 if module_forward else 60
            doc = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno + 1 - len(doc.splitlines())
            assert lines <= limit, f"{path}:{node.lineno}: {node.name} has {lines} lines"


def test_settings_are_few_and_all_are_read():
    keys = known_keys(Settings)
    assert len(keys) <= 100
    code = {path: path.read_text() for path in MODULES}
    for key in keys:
        field = key.rsplit(".", 1)[-1]
        read = re.compile(rf"\.{field}\b")
        assert any(read.search(text) for text in code.values()), f"nothing reads {key}"


def test_names_in_module_docstrings_exist():
    """A backticked name in a module's docstring is defined somewhere in the package."""
    known = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.Name | ast.arg):
                known.add(node.id if isinstance(node, ast.Name) else node.arg)
            elif isinstance(node, ast.Attribute):
                known.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                known.add(node.value)  # keys of files
            elif isinstance(node, ast.alias):
                known.add((node.asname or node.name).split(".")[0])
    for path in MODULES:
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\(.*?\))?`", doc):
            if re.search(r"\.(py|json|jsonl|toml|html|md|jinja|safetensors)$", name):
                continue
            for part in name.split("."):
                assert part in known, f"{path}: its docstring speaks of `{name}`"
