"""Python sources as the house rules see them: parsed, with their imports and lines of code.

folder -> load_sources -> Source (text, tree, lines of code, imports of our own modules)
"""

from __future__ import annotations

import ast
import io
import tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "hasten"
_NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
DefinitionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Import:
    """One imported ``module`` or ``module.name`` (which may be a module too), and how."""

    target: str
    line: int
    is_in_function: bool
    is_for_typing: bool


@dataclass(frozen=True)
class Definition:
    """A function or class with its name within the module (``Class.method``)."""

    name: str
    node: DefinitionNode
    is_public: bool
    is_method: bool
    is_nested: bool  # inside a function


@dataclass(frozen=True)
class Source:
    """One file. ``path`` is relative to the folder that holds the package: ``hasten/core/x.py``."""

    path: str
    text: str

    @property
    def module(self) -> str:
        """The dotted name: ``hasten.core.x``, or ``hasten.core`` for its ``__init__``."""
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        """The part of the house: ``core``; for files outside any package, their own name."""
        return self.path.split("/")[1].removesuffix(".py")

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def code_lines(self) -> frozenset[int]:
        """Numbers of the lines that hold code: no docstring, no comment, not blank."""
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in _NOT_CODE:
                lines.update(range(token.start[0], token.end[0] + 1))
        lines -= self._docstring_lines
        texts = self.text.splitlines()
        return frozenset(line for line in lines if texts[line - 1].strip())

    @cached_property
    def _docstring_lines(self) -> set[int]:
        lines: set[int] = set()
        for node in ast.walk(self.tree):
            if (
                isinstance(node, ast.Module | DefinitionNode)
                and ast.get_docstring(node) is not None
            ):
                docstring = node.body[0]
                lines.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
        return lines

    @cached_property
    def definitions(self) -> tuple[Definition, ...]:
        """All functions and classes, nested ones included, outermost first."""
        found: list[Definition] = []

        def visit(node: ast.AST, prefix: str, *, public: bool, method: bool, nested: bool) -> None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, DefinitionNode):
                    name = f"{prefix}{child.name}"
                    is_public = public and not child.name.startswith("_")
                    found.append(Definition(name, child, is_public, method, nested))
                    is_class = isinstance(child, ast.ClassDef)
                    visit(
                        child,
                        f"{name}.",
                        public=is_public and is_class,
                        method=is_class,
                        nested=nested or not is_class,
                    )
                else:
                    visit(child, prefix, public=public, method=method, nested=nested)

        visit(self.tree, "", public=True, method=False, nested=False)
        return tuple(found)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """Every import, ``from`` ones as ``module.name``, relative ones resolved, and
        ``import_module("...")`` with a literal name.
        """
        found: list[Import] = []

        def visit(node: ast.AST, *, in_function: bool, for_typing: bool) -> None:
            found.extend(
                Import(target, node.lineno, in_function, for_typing)
                for target in self._targets(node)
                if isinstance(node, ast.stmt | ast.expr)
            )
            if isinstance(node, ast.If) and _is_type_checking(node.test):
                for child in node.body:
                    visit(child, in_function=in_function, for_typing=True)
                for child in node.orelse:
                    visit(child, in_function=in_function, for_typing=for_typing)
                return
            inside = in_function or isinstance(node, FunctionNode | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, in_function=inside, for_typing=for_typing)

        visit(self.tree, in_function=False, for_typing=False)
        return tuple(found)

    def _targets(self, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = self.path.removesuffix(".py").split("/")
                base = ".".join([*parts[: -node.level], *([base] if base else [])])
            return [base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"}:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                return [first.value]
        return []


def called_name(call: ast.Call) -> str:
    """The last name of what is called: ``import_module`` for ``importlib.import_module(...)``."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def load_sources(folder: Path, package: str = PACKAGE) -> list[Source]:
    """Reads every Python file of the package that lies in ``folder``, sorted by path."""
    return [
        Source(path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted((folder / package).rglob("*.py"))
    ]


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )
