"""The shape of the code itself: which module may import which, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pockc", "passes", "targets", "tests", "benchmarks", "runtime")
MAXIMUM_LINES = 500

# Layers from the bottom up; a module may import from its own layer and from those below.
LAYERS = (
    ("pockc.errors", "pockc.sizes"),
    ("pockc.compact", "pockc.halves", "pockc.ir", "pockc.ops", "pockc.text", "pockc.verify", "pockc.interp"),
    ("pockc.optim", "pockc.losses", "pockc.scheme", "pockc.recipe"),
    ("pockc.frontend", "pockc.passes"),
    (
        "pockc.abi",
        "pockc.program",
        "pockc.memory_report",
        "pockc.artifact",
        "pockc.artifact_writer",
        "pockc.base_session",
        "pockc.checkpoint",
        "pockc.timeline",
    ),
    ("pockc.targets",),
)


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        # The symlinks pockc/passes and pockc/targets are not followed: those files are seen where they are.
        yield from sorted(p for p in (ROOT / folder).rglob("*.py") if not is_linked(p))


def is_linked(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(ROOT))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("pockc", *parts) if parts[0] in ("passes", "targets") else parts)


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """Modules that a file imports: at run time, and if ``everywhere`` also inside functions and for typing alone."""
    found: set[str] = set()
    pending: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif everywhere or (not isinstance(node, ast.FunctionDef) and not is_typing_block(node)):
            pending += ast.iter_child_nodes(node)
    return found


def is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def layer(module: str) -> int:
    """The layer of a module; above all others if it is in none."""
    for i, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return i
    return len(LAYERS)


def test_modules_import_only_from_their_layer_and_below() -> None:
    broken = []
    for path in python_files("pockc", "passes", "targets"):
        module = module_name(path)
        for imported in imports(path, everywhere=False):
            if not imported.startswith("pockc.") or layer(module) == len(LAYERS):
                continue
            exists = (ROOT / Path(*imported.split("."))).with_suffix(".py").exists() or layer(imported) < len(LAYERS)
            if exists and layer(imported) > layer(module):
                broken.append(f"{module} imports {imported}")
    assert broken == []


@pytest.mark.parametrize("library", ["torch", "transformers", "tvm", "onnx", "onnxruntime"])
def test_frameworks_are_imported_only_by_their_own_module(library: str) -> None:
    users = {
        module_name(path)
        for path in python_files("pockc", "passes", "targets")
        if any(name.split(".")[0] == library for name in imports(path, everywhere=True))
    }
    stems = {f"pockc.frontend.{library}", f"pockc.targets.{library}"}
    stems |= {"pockc.targets.onnxruntime"} if library == "onnx" else set()  # it runs models of that format
    assert {m for m in users if not any(m == s or m.startswith((s + "_", s + ".")) for s in stems)} == set()


def test_no_file_is_longer_than_can_be_read() -> None:
    suffixes = {".py", ".cpp", ".h", ".inc"}
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in suffixes and not is_linked(p)]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert {name: length for name, length in lengths.items() if length > MAXIMUM_LINES} == {}
