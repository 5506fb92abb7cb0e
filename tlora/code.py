"""Which source files of the package a stage depends on, read off its import statements."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

# What only shows how a job goes is no part of its result.
SHOWN_ONLY = frozenset({"tlora.progress", "tlora.tracking"})


def module_file(module: str) -> Path | None:
    """Return the source file of a module of this package, None where there is none."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    base = PACKAGE.joinpath(*parts[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _guarded(node: ast.If) -> bool:
    """Tell whether a block is for type checkers only."""
    test = node.test
    name = test.id if isinstance(test, ast.Name) else getattr(test, "attr", None)
    return name == "TYPE_CHECKING"


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all statements below a node; expressions, which hold none, are not looked into."""
    for name in ("body", "handlers", "cases", "orelse", "finalbody"):
        for node in getattr(tree, name, ()):
            if isinstance(node, ast.If) and _guarded(node):
                for other in node.orelse:
                    yield from (other, *_statements(other))
                continue
            yield node
            yield from _statements(node)


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Return the package's modules that `module` imports itself, also inside its functions."""
    path = module_file(module)
    if path is None:
        return frozenset()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(above) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            found.add(source)
            found.update(f"{source}.{alias.name}" for alias in node.names)
    return frozenset(name for name in found if module_file(name) is not None)


def closure(modules: Iterable[str]) -> list[Path]:
    """Return the source files that importing `modules` can load, with their packages' files.

    Modules found by name at run time (methods, data sources, scorers) are not import statements:
    the caller lists the ones in use. Modules of `SHOWN_ONLY` count only where the caller lists
    them.
    """
    waiting, seen = list(modules), set()
    while waiting:
        module = waiting.pop()
        if module in seen or module_file(module) is None:
            continue
        seen.add(module)
        if "." in module:
            waiting.append(module.rpartition(".")[0])
        waiting.extend(imports(module) - SHOWN_ONLY)
    return sorted(path for path in map(module_file, seen) if path is not None)


def stage_modules(stage: str, spec: dict) -> list[str]:
    """Return the modules a stage starts from: its own, and those that its spec names."""
    modules = [f"tlora.stages.{stage}"]
    if stage == "track":
        modules.append("tlora.tracking")
    folder = "benchmarks" if stage == "score" else "methods"
    if "implementation" in spec:
        modules.append(f"tlora.{folder}.{spec['implementation']}")
    if "backend" in spec:
        modules.append(f"tlora.generation.{spec['backend']}")
    if "likelihood" in spec.get("benchmark", {}):
        modules.append("tlora.generation.likelihood")
    for part in (spec, spec.get("task", {}), spec.get("benchmark", {})):
        if "source" in part:
            modules.append(f"tlora.tasks.{part['source']}")
    return modules


def stage_files(stage: str, spec: dict) -> list[Path]:
    """Return the source files that a stage with this spec depends on, sorted."""
    return list(_closure(tuple(stage_modules(stage, spec))))


@functools.cache
def _closure(modules: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(closure(modules))
