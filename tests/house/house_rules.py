"""The rules of the house (DESIGN.md, sections 1 and 7), each a function from sources to breaches.

    load_sources -> RULES[name](sources) -> [Breach(where, what)] -> minus exemptions

A rule is pure: it sees sources, not the disk, so that ``test_house_rules`` can try it on small
made-up trees and see it fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from exemptions import Exemption
from source_tree import PACKAGE, Definition, FunctionNode, Import, Source, called_name

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8

# Each layer may import those after it; packages in one layer do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("report",),
    ("training",),
    ("plan",),
    ("task", "parallel", "optim"),
    ("model", "data"),
    ("config", "core"),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
# Within a layer, by name: errors are the one thing that config needs of core.
SIDEWAYS = {("config", f"{PACKAGE}.core.errors")}
ROOT = f"{PACKAGE}/__init__.py"  # the lazy public names
VERSION = f"{PACKAGE}.__version__"  # which everyone may import from there

# Third-party packages that only some parts of the house may import.
HOMES = {"typer": {"cli"}, "click": {"cli"}, "rich": {"cli"}, "pydantic": {"config"}}
# And those that some parts may not import.
UNWELCOME = {"config": {"torch", "numpy", "transformers"}}

BANNED_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
BANNED_MODULES |= {"marshal", "torch.package"}
BANNED_TORCH = {"load", "save"}
BANNED_STEMS = {"utils", "util", "helpers", "helper", "common"}

_UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
_MACHINE_PATH = re.compile(r"(?<![\w.~/-])(?:/(?:work|home|root|Users|tmp|mnt)/|[A-Z]:\\\\?Users)")


class Breach(NamedTuple):
    """A place that breaks a rule. ``where`` is stable (no line numbers): exemptions name it."""

    where: str
    what: str


def import_direction(sources: Sequence[Source]) -> Iterator[Breach]:
    """Imports run one way only, and every file is in a package of the house."""
    for source in sources:
        if source.path == ROOT:
            continue
        if source.package not in LEVELS:
            yield Breach(source.path, f"'{source.package}' is no part of the house")
            continue
        for target in _own_targets(source.imports):
            if not _may_import(source.package, target):
                yield Breach(f"{source.path} -> {target}", "imports against the direction")


def no_cycles(sources: Sequence[Source]) -> Iterator[Breach]:
    """No module imports itself through others. Typing-only imports count; lazy ones do not."""
    modules = {source.module for source in sources}
    graph = {
        source.module: sorted(
            {
                found
                for imported in source.imports
                if not imported.is_in_function
                and not (source.path == ROOT and imported.is_for_typing)
                and (found := _module_of(imported.target, modules))
            }
        )
        for source in sources
    }
    for cycle in _cycles(graph):
        yield Breach(" -> ".join([*cycle, cycle[0]]), "imports in a circle")


def no_local_imports(sources: Sequence[Source]) -> Iterator[Breach]:
    """Our own modules are imported at the top, except by the CLI's verbs and the lazy names."""
    for source in sources:
        if source.path == ROOT or source.package == "cli":
            continue
        for imported in source.imports:
            if imported.is_in_function and _is_own(imported.target):
                yield Breach(f"{source.path} -> {imported.target}", "imported inside a function")
        for node in ast.walk(source.tree):
            if (
                isinstance(node, ast.Call)
                and called_name(node) in {"import_module", "__import__"}
                and not (node.args and isinstance(node.args[0], ast.Constant))
            ):
                yield Breach(source.path, "imports a module by a name computed at run time")


def file_length(sources: Sequence[Source]) -> Iterator[Breach]:
    """Files have at most 400 lines of code."""
    for source in sources:
        if len(source.code_lines) > MAX_FILE_LINES:
            yield Breach(source.path, f"{len(source.code_lines)} lines of code")


def function_length(sources: Sequence[Source]) -> Iterator[Breach]:
    """Functions have at most 60 lines of code."""
    for source, definition in _functions(sources):
        node = definition.node
        lines = source.code_lines & set(range(node.lineno, (node.end_lineno or 0) + 1))
        if len(lines) > MAX_FUNCTION_LINES:
            yield Breach(f"{source.path}:{definition.name}", f"{len(lines)} lines of code")


def parameter_count(sources: Sequence[Source]) -> Iterator[Breach]:
    """Functions have at most 8 parameters, ``self`` and ``cls`` not counted."""
    for source, definition in _functions(sources):
        count = _count_parameters(definition)
        if count > MAX_PARAMETERS:
            yield Breach(f"{source.path}:{definition.name}", f"{count} parameters")


def file_names(sources: Sequence[Source]) -> Iterator[Breach]:
    """Nothing is called utils, helpers or common."""
    for source in sources:
        stems = {part.removesuffix(".py").strip("_") for part in source.path.split("/")}
        for stem in sorted(stems & BANNED_STEMS):
            yield Breach(source.path, f"is called '{stem}'")


def docstrings(sources: Sequence[Source]) -> Iterator[Breach]:
    """Every module, public class and public function (methods included) has a docstring."""
    for source in sources:
        if not ast.get_docstring(source.tree):
            yield Breach(source.path, "has no docstring")
        for definition in source.definitions:
            if (
                definition.is_public
                and not definition.is_nested
                and not _is_overload_or_setter(definition.node)
                and not ast.get_docstring(definition.node)
            ):
                yield Breach(f"{source.path}:{definition.name}", "has no docstring")


def no_pickle(sources: Sequence[Source]) -> Iterator[Breach]:
    """No pickle, nor anything that reads or writes one."""
    for source in sources:
        torch_names = _names_of_torch(source.tree)
        for imported in source.imports:
            first = imported.target.split(".")[0]
            two = ".".join(imported.target.split(".")[:2])
            if first in BANNED_MODULES or two in BANNED_MODULES:
                yield Breach(f"{source.path} -> {first}", "may read or write a pickle")
            if imported.target in {f"torch.{name}" for name in BANNED_TORCH}:
                yield Breach(f"{source.path} -> {imported.target}", "reads or writes a pickle")
        for node in ast.walk(source.tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in BANNED_TORCH
                and _is_torch(node.value, torch_names)
            ):
                yield Breach(f"{source.path} -> torch.{node.attr}", "reads or writes a pickle")
            if (
                isinstance(node, ast.keyword)
                and node.arg == "allow_pickle"
                and not (isinstance(node.value, ast.Constant) and node.value.value is False)
            ):
                yield Breach(f"{source.path} -> allow_pickle", "may read a pickle")


def no_stubs(sources: Sequence[Source]) -> Iterator[Breach]:
    """Nothing is left for later: no notes to self, no NotImplementedError, no empty bodies."""
    for source in sources:
        for match in _UNFINISHED.finditer(source.text):
            yield Breach(source.path, f"holds a {match.group()}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Raise) and _raises_not_implemented(node):
                yield Breach(source.path, "raises NotImplementedError")
        protocols = {d.name for d in source.definitions if _is_protocol(d.node)}
        for definition in source.definitions:
            if (
                isinstance(definition.node, FunctionNode)
                and definition.name.rpartition(".")[0] not in protocols
                and not _decorators(definition.node) & {"abstractmethod", "overload"}
                and _is_empty(definition.node)
            ):
                yield Breach(f"{source.path}:{definition.name}", "has an empty body")


def no_machine_paths(sources: Sequence[Source]) -> Iterator[Breach]:
    """No path of one person's machine."""
    for source in sources:
        for match in _MACHINE_PATH.finditer(source.text):
            line = source.text.count("\n", 0, match.start()) + 1
            yield Breach(source.path, f"line {line} names a path under {match.group()}")


def third_party_homes(sources: Sequence[Source]) -> Iterator[Breach]:
    """typer and rich belong to cli, pydantic to config; config knows nothing of torch."""
    for source in sources:
        for imported in source.imports:
            first = imported.target.split(".")[0]
            homes = HOMES.get(first, {source.package})
            if source.package not in homes or first in UNWELCOME.get(source.package, ()):
                yield Breach(f"{source.path} -> {first}", "does not belong in this package")


RULES: dict[str, Callable[[Sequence[Source]], Iterator[Breach]]] = {
    rule.__name__: rule
    for rule in (
        import_direction,
        no_cycles,
        no_local_imports,
        file_length,
        function_length,
        parameter_count,
        file_names,
        docstrings,
        no_pickle,
        no_stubs,
        no_machine_paths,
        third_party_homes,
    )
}


def check(
    rule: str, sources: Sequence[Source], exemptions: Iterable[Exemption]
) -> tuple[list[str], list[Exemption]]:
    """Applies a rule.

    Returns:
        What breaks it, one line each, and the exemptions of this rule that nothing needs.
    """
    breaches = list(dict.fromkeys(RULES[rule](sources)))
    exempt = {entry.where: entry for entry in exemptions if entry.rule == rule}
    failures = [f"{b.where}: {b.what}" for b in breaches if b.where not in exempt]
    unneeded = set(exempt) - {breach.where for breach in breaches}
    return failures, [exempt[where] for where in sorted(unneeded)]


def _is_own(target: str) -> bool:
    return target == PACKAGE or target.startswith(f"{PACKAGE}.")


def _own_targets(imports: Iterable[Import]) -> list[str]:
    return sorted({found.target for found in imports if _is_own(found.target)})


def _may_import(package: str, target: str) -> bool:
    parts = target.split(".")
    if target == VERSION:
        return True
    if len(parts) == 1 or parts[1] not in LEVELS:
        return package in {"__main__", "cli"}  # the public names: only the top may use them
    if package == parts[1] or LEVELS[package] < LEVELS[parts[1]]:
        return True
    return any(
        package == origin and (target == module or target.startswith(f"{module}."))
        for origin, module in SIDEWAYS
    )


def _module_of(target: str, modules: set[str]) -> str | None:
    """The module that an import loads: ``a.b.name`` is ``a.b`` unless ``a.b.name`` is a module."""
    while target and target not in modules:
        target = target.rpartition(".")[0]
    return target or None


def _cycles(graph: dict[str, list[str]]) -> Iterator[list[str]]:
    """One cycle for each strongly connected part, starting at its smallest name."""
    reachable = {node: _reach(graph, node) for node in graph}
    seen: set[str] = set()
    for start in sorted(graph):
        if start in reachable[start] and start not in seen:
            seen |= {node for node in reachable[start] if start in reachable[node]}
            yield _shortest_way(graph, start)


def _reach(graph: dict[str, list[str]], start: str) -> set[str]:
    found: set[str] = set()
    pending = list(graph[start])
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(graph[node])
    return found


def _shortest_way(graph: dict[str, list[str]], start: str) -> list[str]:
    """The modules on a shortest way from ``start`` back to it, without the return."""
    ways, seen = [[start]], {start}
    while ways:
        way = ways.pop(0)
        for node in graph[way[-1]]:
            if node == start:
                return way
            if node not in seen:
                seen.add(node)
                ways.append([*way, node])
    raise AssertionError("start lies on a cycle")


def _functions(sources: Iterable[Source]) -> Iterator[tuple[Source, Definition]]:
    for source in sources:
        for definition in source.definitions:
            if isinstance(definition.node, FunctionNode):
                yield source, definition


def _count_parameters(definition: Definition) -> int:
    assert isinstance(definition.node, FunctionNode)
    args = definition.node.args
    count = len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)
    count += (args.vararg is not None) + (args.kwarg is not None)
    has_self = definition.is_method and "staticmethod" not in _decorators(definition.node)
    return count - (has_self and bool(args.posonlyargs or args.args))


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    """The last names of a definition's decorators: ``setter`` for ``@value.setter``."""
    names = set()
    for decorator in node.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(target, ast.Attribute):
            names.add(target.attr)
        elif isinstance(target, ast.Name):
            names.add(target.id)
    return names


def _is_overload_or_setter(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return bool(_decorators(node) & {"overload", "setter", "deleter"})


def _is_protocol(node: ast.AST) -> bool:
    if not isinstance(node, ast.ClassDef):
        return False
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return any(
        (isinstance(base, ast.Name) and base.id == "Protocol")
        or (isinstance(base, ast.Attribute) and base.attr == "Protocol")
        for base in bases
    )


def _is_empty(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether only ``pass`` or ``...`` follows the docstring; a docstring alone is a body."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return bool(body) and all(
        isinstance(statement, ast.Pass)
        or (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Constant)
            and statement.value.value is ...
        )
        for statement in body
    )


def _raises_not_implemented(node: ast.Raise) -> bool:
    raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"


def _is_torch(value: ast.expr, torch_names: set[str]) -> bool:
    """Whether an expression is ``torch`` or ``torch.serialization``, under whatever name."""
    if isinstance(value, ast.Attribute) and value.attr == "serialization":
        value = value.value
    return isinstance(value, ast.Name) and value.id in torch_names


def _names_of_torch(tree: ast.Module) -> set[str]:
    """The names that ``torch`` and ``torch.serialization`` have in a module."""
    names = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in {"torch", "torch.serialization"} and alias.asname:
                    names.add(alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            names |= {
                alias.asname or alias.name for alias in node.names if alias.name == "serialization"
            }
    return names
