"""Tests of tests: a copy of the code, one break of it, and the tests that must notice.

A first draft of a test passes on broken code more often than one thinks. A mutant whose text no
longer occurs in the code is an error: change it along with the code.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def copy_code(folder: Path, *names: str) -> None:
    """Copy folders and files of the checkout."""
    for name in names:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)


def break_code(folder: Path, module: str, old: str, new: str) -> None:
    """Change the one place of a copied module that has a text."""
    file = folder / "summerlm" / f"{module}.py"
    code = file.read_text()
    assert code.count(old) == 1, f"{old!r} occurs {code.count(old)} times in {module}.py"
    file.write_text(code.replace(old, new))


def run_tests(folder: Path, *arguments: str) -> int:
    """Run tests on the copy until one fails; 0 = all passed, 1 = one failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.returncode
