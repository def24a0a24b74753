"""The house: imports go one way, TensorRT stays inside `engines/`, public names are listed and exist."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("calib", "passes", "engines")
# What each folder may import of the three.
ALLOWED = {"calib": {"calib"}, "passes": {"calib", "passes"}, "engines": {"calib", "passes", "engines"}}
TENSORRT = {"torch_tensorrt", "tensorrt", "tensorrt_rtx"}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The packages that a tree imports, also through `importlib.import_module("...")`: those of calibcast by theirs."""
    return map(top_of, imported_names(tree))


def top_of(name: str) -> str:
    parts = name.removeprefix("calibcast.").split(".")
    return parts[0]


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            within = f"{node.module}." if node.module == "calibcast" else None
            yield from (f"{within}{alias.name}" for alias in node.names) if within else [str(node.module)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in {
            "import_module",
            "__import__",
        }:
            yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: all but function bodies and what is for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from run_on_import(node)


def imported_at_once(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in run_on_import(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(imported(node))
    return names


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    """`calib <- passes <- engines`: no file imports a later package, nor tests and benchmarks, not even lazily."""
    package = path.relative_to(ROOT).parts[0]
    own = set(imported(parse(path))) & {*PACKAGES, "tests", "benchmarks"}
    assert own <= ALLOWED[package]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tensorrt_stays_inside_engines(path: Path) -> None:
    """Only `engines/` imports Torch-TensorRT or TensorRT, and only inside functions, when a backend needs it."""
    tree = parse(path)
    assert not imported_at_once(tree) & TENSORRT
    if path.relative_to(ROOT).parts[0] != "engines":
        assert not set(imported(tree)) & TENSORRT


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_absolute(path: Path) -> None:
    """Every import says from which package it is, so that the two tests above see it."""
    relative = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and node.level]
    assert relative == []


def module_name(path: Path) -> str:
    """The dotted name of a file; of an `__init__.py`, that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("calibcast", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def modules_imported(tree: ast.AST, modules: Set[str]) -> set[str]:
    """Those of `modules` that a tree imports: at once, inside a function, and for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules or {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def first_circle(imports: Mapping[str, Set[str]]) -> list[str]:
    """The modules of one circle, or nothing."""
    try:
        tuple(TopologicalSorter(imports).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_make_no_circle() -> None:
    """Each file can be read after those that it imports. A deferred import counts: it only hides a circle.

    Left out are the packages' own `__init__` files, which give names lazily.
    """
    files = {module_name(path): path for path in FILES if path.parent.parent != ROOT or path.name != "__init__.py"}
    circle = first_circle({name: modules_imported(parse(path), files.keys()) for name, path in files.items()})
    assert circle == [], f"a circle of imports: {' <- '.join(circle)}"


def test_circle_walk_sees_what_it_should() -> None:
    """The walk itself: circles through a function, a type checker's import, and a module imported from its package."""
    names = {"p.a", "p.b", "p.c"}
    at_once, deferred = "from p.b import x", "def f():\n    from p import c, other"
    typed = "if TYPE_CHECKING:\n    import p.a"
    imports = {n: modules_imported(ast.parse(t), names) for n, t in zip("abc", (at_once, deferred, typed), strict=True)}
    assert imports == {"a": {"p.b"}, "b": {"p.c"}, "c": {"p.a"}}
    assert set(first_circle({f"p.{name}": found for name, found in imports.items()})) == names
    assert first_circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_import_walk_sees_what_it_should() -> None:
    """The walk itself: lazy, dynamic and conditional imports are seen, function bodies are not run on import."""
    lazy = "def g():\n    import h\n    importlib.import_module('i.j')\n"
    tree = ast.parse("import a.b\nfrom c.d import e\nif x:\n    import f\n" + lazy)
    assert set(imported(tree)) == {"a", "c", "f", "h", "i"}
    assert set(imported(ast.parse("from calibcast import calib\nfrom calibcast.passes.x import y"))) == {
        "calib",
        "passes",
    }
    assert imported_at_once(tree) == {"a", "c", "f"}


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_and_exist(package: str) -> None:
    """`__all__` of each package is sorted, without repeats, and every name in it can be imported."""
    module = importlib.import_module(f"calibcast.{package}")
    assert list(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_no_init_files_under_tests() -> None:
    """With an `__init__.py` there, `import calib` could find the tests instead; equal base names would clash."""
    tests = ROOT / "tests"
    names = [path.name for path in tests.rglob("test_*.py")]
    assert list(tests.rglob("__init__.py")) == []
    assert len(names) == len(set(names))


def test_importing_everything_brings_no_tensorrt() -> None:
    """In a fresh process, importing the three packages loads neither Torch-TensorRT nor TensorRT."""
    script = f"import sys; from calibcast import calib, passes, engines; print(sorted({TENSORRT!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# What an operator does is said in `calib/operators/`; a builder's quirks with operators, in one file of data. Those in
# `calib/pt2/` are names of Python's and sympy's functions, which a file may hold.
OPERATOR_TABLES = ("calib/operators/", "calib/pt2/", "engines/tensorrt/quirks.py")
# Names of operators that are words of calibcast's own: columns, statistics, parts of a data set. They are let pass
# where they are not compared with an operator.
WORDS = set(
    """
    alias any complex data diagonal dim dropout equal flip gradient histogram index inner item log max mean min normal
    quantile set size sort split sum to unique zeros
    """.split()  # noqa: SIM905
)


def operators_named(tree: ast.AST) -> Iterator[str]:
    """The operators that a tree names: `torch.ops.aten.add`, and strings such as "add", also within lists of words.

    What is put into a graph, a constant such as `CAST = torch.ops.aten._to_copy.default`, is let pass.
    """
    assigned = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign)]
    inserted = [n.args[0] for n in ast.walk(tree) if isinstance(n, ast.Call) and "call_function" in ast.unparse(n.func)]
    constants = [value for value in (*assigned, *inserted) if isinstance(value, ast.Attribute)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"aten", "prims"}:
            if not any(node in ast.walk(value) for value in constants):
                yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.split()
            if (len(words) > 1 or words == [node.value]) and set(words) <= operator_names() and not set(words) <= WORDS:
                yield node.value
        elif isinstance(node, ast.Compare) and asks_for_operator(node):
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            yield from (text for text in texts if text in operator_names() & WORDS)


def asks_for_operator(compare: ast.Compare) -> bool:
    names = [getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(compare)]
    return bool({"base", "base_op"} & set(names))


@cache
def operator_names() -> frozenset[str]:
    """The names of all ATen operators, without overload; in place too, without the mark."""
    import torch

    known = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    names = {name.removeprefix("aten::").split(".")[0] for name in known}
    return frozenset(names | {name.rstrip("_") for name in names} - {""})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_operators_are_named_in_their_table(path: Path) -> None:
    """One table says what an operator does; the rest of the code asks it, by `operator_of` or one of its sets."""
    if str(path.relative_to(ROOT)).startswith(OPERATOR_TABLES):
        return
    named = sorted(set(operators_named(parse(path))))
    assert named == [], f"{path.name} names operators: say what they do in calib/operators/, and ask for that"


def test_operator_walk_sees_what_it_should() -> None:
    """The walk itself: words in sets, in lists of words and in comparisons; not columns, not constants to insert."""
    assert list(operators_named(ast.parse("X = {'linear', 'sum'}"))) == ["linear"]
    assert list(operators_named(ast.parse("X = 'add sub mul'.split()"))) == ["add sub mul"]
    assert list(operators_named(ast.parse("if base_op(n.target) == 'sum': pass"))) == ["sum"]
    assert list(operators_named(ast.parse("if n.target is torch.ops.aten.add.Tensor: pass"))) == ["torch.ops.aten"]
    assert list(operators_named(ast.parse("CAST = torch.ops.aten.add.Tensor; frame['mean'] = 'the sum of it'"))) == []
