"""Shapes and guards of a program: text that torch gives to sympy's parser and to `exec`. Both run any Python.

So the text is parsed here first, to a syntax tree only, and each node of the tree must be in a small grammar: numbers,
symbols, arithmetic, comparisons, and calls of functions of a fixed list.
"""

from __future__ import annotations

import ast
import math
import re

from calibcast.calib.pt2.refusal import RefusedError, shown

MOST_CHARACTERS = 100_000
# The largest number that constants may grow to, in bits: sympy evaluates powers of constants at once.
MOST_BITS = 4096
# torch counts up to the number of a symbol without a value ("u0"), one by one.
MOST_UNBACKED = 1_000_000
MOST_PRECISION = 1_000
# torch multiplies expressions out: n factors of two terms give 2^n.
MOST_TERMS = 1_000
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z_0-9]{0,63}")
_UNBACKED = re.compile(r"z?uf?(\d+)")
_NUMBER = re.compile(r"[-+]?[0-9.]{1,40}(e[-+]?\d{1,4})?|[-+]?(inf|nan|oo)")
_OPAQUE = re.compile(r"(OpaqueUnaryFn|BitwiseFn)_[a-z_0-9]{1,24}")

# Classes and functions of sympy, as `sympy.srepr` and `str` write them, and those of torch.utils._sympy.functions.
FUNCTIONS = frozenset(
    (
        "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "floor", "ceiling",
        "sign", "sqrt", "exp", "log", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "LessThan",
        "StrictLessThan", "GreaterThan", "StrictGreaterThan", "And", "Or", "Not", "Xor", "Piecewise", "ExprCondPair",
        "Tuple", "BooleanTrue", "BooleanFalse", "Infinity", "NegativeInfinity", "IntInfinity", "NegativeIntInfinity",
        "NaN", "Half", "Zero", "One", "NegativeOne", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv",
        "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv",
        "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal",
        "ToFloat", "Identity",
    )
)  # fmt: skip
_KEYWORDS = frozenset(
    (
        "integer", "positive", "negative", "nonnegative", "nonpositive", "real", "finite", "zero", "nonzero",
        "precision",
    )
)  # fmt: skip
_POWERS = frozenset(["Pow", "PowByNatural", "FloatPow"])
_SHIFTS = frozenset(["LShift", "RShift"])
_GUARD_FUNCTIONS = frozenset(
    (
        "len", "int", "float", "bool", "abs", "min", "max", "round", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Mod", "Max",
        "Min", "And", "Or", "Not", "FloorDiv", "PythonMod", "cast_symbool_to_symint_guardless",
        "IsNonOverlappingAndDenseIndicator",
    )
)  # fmt: skip
_MATH = frozenset(
    (
        "floor", "ceil", "trunc", "isnan", "isinf", "sqrt", "log", "log2", "exp", "pow", "inf", "nan", "pi",
    )
)  # fmt: skip
_METHODS = frozenset({"size", "stride", "storage_offset", "dim", "numel", "item"})
_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv,
    ast.Mod, ast.Pow, ast.LShift, ast.RShift, ast.BitAnd, ast.BitOr, ast.BitXor, ast.USub, ast.UAdd, ast.Not,
    ast.Invert, ast.And, ast.Or, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Is, ast.IsNot, ast.Load,
    ast.IfExp, ast.Tuple,
)  # fmt: skip


def check_expression(text: str) -> None:
    """Raise RefusedError unless `text` is a shape expression: numbers, symbols, arithmetic and known functions."""
    for node in ast.walk(parsed := _parsed(text, "shape expression")):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not _known_function(node.func.id):
                raise RefusedError(
                    f"the shape expression {shown(text)}: it calls something else than a function of shapes"
                )
            _check_keywords(node, text)
        elif isinstance(node, ast.Name):
            check_symbol(node.id)
        elif isinstance(node, ast.Constant):
            _check_constant(node, text)
        elif not isinstance(node, (*_NODES, ast.keyword)):
            raise RefusedError(f"the shape expression {shown(text)}: it has a {type(node).__name__}")
    _check_strings(parsed, text)
    _check_growth(parsed, f"the shape expression {shown(text)}")


def check_symbol(name: str) -> None:
    """Raise RefusedError unless `name` is the name of a symbol or of a known function."""
    if not _SYMBOL.fullmatch(name) or name.startswith("__"):
        raise RefusedError(f"the symbol {shown(name)}")
    if (match := _UNBACKED.fullmatch(name)) and (len(match[1]) > 7 or int(match[1]) > MOST_UNBACKED):
        raise RefusedError(f"the symbol {shown(name)}: torch would count up to its number")


def check_guard(text: str) -> None:
    """Raise RefusedError unless `text` compares sizes and values of inputs: `L['x'].size()[0] <= 8` and the like."""
    if any(mark in text for mark in '"\\\n\r{}#'):
        raise RefusedError(f"the guard {shown(text)}: it has a character that guards do not need")
    parsed = _parsed(text, "guard")
    for node in ast.walk(parsed):
        complaint = _complaint(node)
        if complaint is not None:
            raise RefusedError(f"the guard {shown(text)}: {complaint}")
    _check_growth(parsed, f"the guard {shown(text)}")


def _complaint(node: ast.AST) -> str | None:
    """What is wrong with one node of a guard's syntax tree; None for nothing."""
    if isinstance(node, ast.Call):
        return None if _is_size_function(node) else "it calls something else than a function of sizes"
    if isinstance(node, ast.Attribute):
        fine = not node.attr.startswith("_") and _from_input(node)
        return None if fine else f"it reads the attribute {shown(node.attr)}"
    if isinstance(node, ast.Subscript):
        fine = isinstance(node.slice, (ast.Constant, ast.UnaryOp)) and _from_input(node)
        return None if fine else "it indexes something else than an input"
    if isinstance(node, ast.Constant):
        fine = type(node.value) in (int, float, bool, str, type(None)) and "'" not in str(node.value)
        return None if fine else f"it has the constant {shown(node.value)}"
    if isinstance(node, ast.Name):
        return None if node.id in ("L", "math", "inf", *_GUARD_FUNCTIONS) else f"it names {shown(node.id)}"
    return None if isinstance(node, _NODES) else f"it has a {type(node).__name__}"


def _is_size_function(node: ast.Call) -> bool:
    function = node.func
    if node.keywords:
        return False
    if isinstance(function, ast.Name):
        return function.id in _GUARD_FUNCTIONS
    if not isinstance(function, ast.Attribute):
        return False
    if isinstance(function.value, ast.Name) and function.value.id == "math":
        return function.attr in _MATH
    return function.attr in _METHODS and not node.args


def _from_input(node: ast.expr) -> bool:
    """Whether a chain of attributes, indices and calls starts at the inputs `L`, or is one of `math`'s functions."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "math":
        return node.attr in _MATH
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Name) and node.id == "L"


def _parsed(text: str, what: str) -> ast.Expression:
    if len(text) > MOST_CHARACTERS:
        raise RefusedError(f"a {what} of {len(text)} characters")
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RefusedError(f"the {what} {shown(text)}, which cannot be parsed") from error


def _known_function(name: str) -> bool:
    return name in FUNCTIONS or _OPAQUE.fullmatch(name) is not None


def _check_keywords(node: ast.Call, text: str) -> None:
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg not in _KEYWORDS or not isinstance(value, int) or value > MOST_PRECISION:
            raise RefusedError(f"the shape expression {shown(text)}: it has the keyword {shown(keyword.arg)}")


def _check_constant(node: ast.Constant, text: str) -> None:
    if type(node.value) not in (int, float, bool, str):
        raise RefusedError(f"the shape expression {shown(text)}: it has the constant {shown(node.value)}")


def _check_growth(parsed: ast.Expression, what: str) -> None:
    try:
        bits = _bits(parsed.body)
    except (RecursionError, OverflowError) as error:
        raise RefusedError(f"{what}: it is nested too deeply") from error
    if bits > MOST_BITS:
        raise RefusedError(f"{what}: its constants grow beyond {MOST_BITS} bits")
    if _terms(parsed.body) > MOST_TERMS:
        raise RefusedError(f"{what}: multiplied out, it has more than {MOST_TERMS} terms")


def _check_strings(parsed: ast.Expression, text: str) -> None:
    """Text is allowed only where `srepr` writes it: `Symbol('s0')` and `Float('1.5', precision=53)`."""
    right: set[int] = set()
    for node in ast.walk(parsed):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            if node.func.id == "Symbol":
                check_symbol(first.value)
                right.add(id(first))
            elif node.func.id == "Float" and _NUMBER.fullmatch(first.value):
                right.add(id(first))
    for node in ast.walk(parsed):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in right:
            raise RefusedError(f"the shape expression {shown(text)}: it has text where none belongs")


def _bits(node: ast.AST) -> float:
    """A bound on the bits of the constants that evaluating an expression may give; a symbol counts as two bits."""
    if isinstance(node, ast.Constant):
        return max(2, node.value.bit_length()) if isinstance(node.value, int) else 64
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    pair = _pair(node, name)
    if pair is not None:
        base, exponent = pair
        grown = min(_value(exponent), 1e9)
        return _bits(base) + grown if name in _SHIFTS or _is_shift(node) else _bits(base) * max(1.0, grown)
    return sum(_bits(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)) or 2


def _terms(node: ast.AST) -> float:
    """A bound on the terms of an expression when it is multiplied out."""
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    pair = _pair(node, name)
    if pair is not None:
        return float(_terms(pair[0]) ** min(_value(pair[1]), 64.0))
    parts = [_terms(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    if name == "Mul" or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return float(math.prod(parts))
    return max(sum(parts), 1.0)


def _pair(node: ast.AST, name: str) -> tuple[ast.expr, ast.expr] | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)):
        return node.left, node.right
    if isinstance(node, ast.Call) and name in _POWERS | _SHIFTS and len(node.args) == 2:
        return node.args[0], node.args[1]
    return None


def _is_shift(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift)


def _value(node: ast.expr) -> float:
    """A bound on an exponent: its number; 2^bits if several numbers form it; 1 if it has only symbols."""
    found = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    numbers = [float(value) for value in found if isinstance(value, int | float)]
    if not numbers:
        return 1.0
    return 2.0 ** min(_bits(node), 64.0) if len(numbers) > 1 else abs(numbers[0])
