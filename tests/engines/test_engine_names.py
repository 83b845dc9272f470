"""An engine that somebody else makes is known to its own adapter and to nobody else.

What the adapters share is in `engines/common`, which names none; two adapters never import one another; and nothing in
the package asks which engine it has, so that another one can be added without touching what is there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rollout_wal"
ENGINES = ("sglang", "vllm")
#: Trainers have names for their own arguments and modules, and bring engines of their own to be told from ours.
TRAINERS = PACKAGE / "trainers"


def files(engine: str) -> Iterator[Path]:
    """Python files outside of the engine's own folder."""
    own = PACKAGE / "engines" / engine
    assert own.is_dir()
    return (path for path in sorted(PACKAGE.rglob("*.py")) if own not in path.parents)


def imported(path: Path) -> Iterator[str]:
    """Names of modules that a file imports, as written, relative ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_file_outside_of_its_folder_imports_it(engine: str) -> None:
    found = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in files(engine)
        for name in imported(path)
        if engine in re.split(r"\.+", name)
    ]
    assert found == []


@pytest.mark.parametrize("engine", ENGINES)
def test_no_file_outside_of_its_folder_names_it(engine: str) -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in files(engine)
        if TRAINERS not in path.parents
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if engine in line.lower()
    ]
    assert found == []


@pytest.mark.parametrize("engine", ENGINES)
def test_trainers_do_not_ask_which_engine_they_have(engine: str) -> None:
    """They may say the name, but no comparison and no path of an adapter depends on it."""
    found = []
    for path in sorted(TRAINERS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            texts = [n.value for c in compared for n in ast.walk(c) if isinstance(n, ast.Constant)]
            if any(isinstance(text, str) and text.lower() == engine for text in texts):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
        assert f"rollout_wal.engines.{engine}" not in path.read_text(), path
    assert found == []
