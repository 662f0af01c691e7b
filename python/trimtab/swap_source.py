"""What a module class does with its children, read from the source of its methods.

swap_ asks two things of a parent: does it read ``self.fc.weight`` instead of calling ``self.fc``, and
does the output of ``self.fc`` go straight into ``self.act`` and nowhere else. BERT's and ViT's
intermediate blocks, torch.nn.TransformerEncoderLayer and most MLPs are recognized this way, with no
list of names and no import of their libraries. Where there is no source there is no fusion.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections import Counter
from functools import lru_cache
from typing import Any

from torch import nn

# Reading these of a child does not let its output be seen.
_HARMLESS = {"weight", "bias", "in_features", "out_features", "training"}
# With these a class can reach its children by a name that the source does not show.
_DYNAMIC = {"_modules", "children", "named_children", "__dict__", "get_submodule"}


class _Method:
    """The uses of ``self.<child>`` in one function."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.function = function
        arguments = [*function.args.posonlyargs, *function.args.args]
        self.self_name = arguments[0].arg if arguments else ""
        self.loads: Counter[str] = Counter()
        self.weight_reads: set[str] = set()
        self.pairs: list[tuple[str, str]] = []
        self.variables: Counter[str] = Counter()
        self.dynamic = False
        for node in ast.walk(function):
            self._visit(node)
        for node in ast.walk(function):
            for block in ("body", "orelse", "finalbody"):
                statements = getattr(node, block, None)
                if isinstance(statements, list):
                    self._adjacent(statements)

    def _attribute(self, node: ast.AST | None) -> str:
        """``name`` for the expression ``self.name``, else nothing."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return node.attr if node.value.id == self.self_name else ""
        return ""

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            self.variables[node.id] += 1
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if name := self._attribute(node):
                self.loads[name] += 1
                self.dynamic |= name in _DYNAMIC
            if (name := self._attribute(node.value)) and node.attr in _HARMLESS:
                self.loads[name] -= 1
                if node.attr == "weight":
                    self.weight_reads.add(name)
        if isinstance(node, ast.Call):
            self._visit_call(node)

    def _visit_call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "vars"):
            target = node.args[0] if node.args else None
            self.dynamic |= isinstance(target, ast.Name) and target.id == self.self_name
        # self.act(self.fc(x))
        outer = self._attribute(node.func)
        if (
            outer
            and len(node.args) == 1
            and not node.keywords
            and isinstance(node.args[0], ast.Call)
        ):
            if inner := self._attribute(node.args[0].func):
                self.pairs.append((inner, outer))

    def _adjacent(self, statements: list[Any]) -> None:
        """``v = self.fc(x)`` and next ``w = self.act(v)``, with v overwritten or read only there."""
        for first, second in itertools.pairwise(statements):
            if not isinstance(first, ast.Assign) or len(first.targets) != 1:
                continue
            target, value = first.targets[0], first.value
            inner = self._attribute(value.func) if isinstance(value, ast.Call) else ""
            if not inner or not isinstance(target, ast.Name):
                continue
            if not isinstance(second, ast.Assign | ast.Return) or not isinstance(
                second.value, ast.Call
            ):
                continue
            call = second.value
            outer = self._attribute(call.func)
            alone = len(call.args) == 1 and not call.keywords
            if not outer or not alone or not isinstance(call.args[0], ast.Name):
                continue
            overwritten = isinstance(second, ast.Return) or (
                len(second.targets) == 1
                and isinstance(second.targets[0], ast.Name)
                and second.targets[0].id == target.id
            )
            if call.args[0].id == target.id and (overwritten or self.variables[target.id] == 1):
                self.pairs.append((inner, outer))


@lru_cache(maxsize=512)
def _methods(cls: type) -> dict[str, _Method] | None:
    """The methods in force of a class below nn.Module; None where a source cannot be had."""
    found: dict[str, _Method] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, member in vars(base).items():
            if isinstance(member, property):
                member = member.fget
            if name in found or name == "__init__" or not inspect.isfunction(member):
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(member))))
            except (OSError, TypeError, SyntaxError):
                return None
            if tree.body and isinstance(tree.body[0], ast.FunctionDef):
                found[name] = _Method(tree.body[0])
    return found


@lru_cache(maxsize=512)
def weight_reads(cls: type) -> frozenset[str]:
    """Children whose ``.weight`` is read by forward or by what forward calls on self."""
    methods = _methods(cls) or {}
    reached, waiting = set(), ["forward"]
    while waiting:
        name = waiting.pop()
        if name in methods and name not in reached:
            reached.add(name)
            waiting += methods[name].loads
    return frozenset(child for name in reached for child in methods[name].weight_reads)


@lru_cache(maxsize=512)
def straight_pairs(cls: type) -> tuple[tuple[str, str], ...]:
    """(fc, act) attribute names: fc's output goes into act, and neither is used for anything else."""
    methods = _methods(cls)
    if methods is None or any(method.dynamic for method in methods.values()):
        return ()
    uses: Counter[str] = Counter()
    for method in methods.values():
        uses.update(method.loads)
    pairs = [pair for method in methods.values() for pair in method.pairs]
    return tuple(pair for pair in pairs if uses[pair[0]] == 1 and uses[pair[1]] == 1)
