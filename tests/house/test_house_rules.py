"""The rules of the house tried on small made-up sources: each must fail, and only where it should.

A case is (rule, sources that break it with the places expected, sources that keep it).
"""

from __future__ import annotations

from textwrap import indent

import pytest
from exemptions import Exemption
from house_rules import RULES, Source, check
from source_tree import load_sources

DOC = '"""Doc."""\n'


def _sources(files):
    return [Source(path, text) for path, text in files.items()]


def _breaches(rule, files):
    return [breach.where for breach in RULES[rule](_sources(files))]


def _module(path, *lines):
    return {path: DOC + "\n".join(lines) + "\n"}


def _function(num_lines, *, extra="", header="def f():"):
    """A function of exactly ``num_lines`` lines of code, its docstring and ``extra`` aside."""
    body = "\n".join(f"    x = {i}" for i in range(num_lines - 1))
    return f'{header}\n    """Doc,\n\n    and more.\n    """\n{extra}{body}\n'


# rule -> [(files, places expected to break it)]
BREAKING = {
    "import_direction": [
        (
            _module("hasten/model/a.py", "from hasten.training import loop"),
            ["hasten/model/a.py -> hasten.training.loop"],
        ),
        (
            _module("hasten/task/a.py", "import hasten.optim.state"),
            ["hasten/task/a.py -> hasten.optim.state"],
        ),
        (
            _module("hasten/core/a.py", "from hasten.config.run import Run"),
            ["hasten/core/a.py -> hasten.config.run.Run"],
        ),
        (
            _module("hasten/config/a.py", "from hasten.core.files import lock"),
            ["hasten/config/a.py -> hasten.core.files.lock"],
        ),
        (
            _module("hasten/data/a.py", "def f():", "    from hasten.plan import probe"),
            ["hasten/data/a.py -> hasten.plan.probe"],
        ),
        (
            _module("hasten/data/a.py", "from ..plan import probe"),
            ["hasten/data/a.py -> hasten.plan.probe"],
        ),
        (
            _module("hasten/data/a.py", "from .. import plan"),
            ["hasten/data/a.py -> hasten.plan"],
        ),
        (
            _module("hasten/core/__init__.py", "from ..data import rows"),
            ["hasten/core/__init__.py -> hasten.data.rows"],
        ),
        (
            _module("hasten/data/a.py", "m = importlib.import_module('hasten.plan.probe')"),
            ["hasten/data/a.py -> hasten.plan.probe"],
        ),
        (
            _module("hasten/data/a.py", "if TYPE_CHECKING:", "    import hasten.plan"),
            ["hasten/data/a.py -> hasten.plan"],
        ),
        (
            _module("hasten/data/a.py", "from hasten import train"),
            ["hasten/data/a.py -> hasten.train"],
        ),
        (_module("hasten/data/a.py", "import hasten"), ["hasten/data/a.py -> hasten"]),
        (_module("hasten/extras/a.py"), ["hasten/extras/a.py"]),
        (_module("hasten/stray.py"), ["hasten/stray.py"]),
    ],
    "no_cycles": [
        (
            {
                **_module("hasten/core/a.py", "from hasten.core import b"),
                **_module("hasten/core/b.py", "from hasten.core.c import x"),
                **_module("hasten/core/c.py", "import hasten.core.a"),
            },
            ["hasten.core.a -> hasten.core.b -> hasten.core.c -> hasten.core.a"],
        ),
        (
            {
                **_module("hasten/core/__init__.py", "from hasten.core.a import y"),
                **_module("hasten/core/a.py", "from hasten.core import x"),
            },
            ["hasten.core -> hasten.core.a -> hasten.core"],
        ),
        (
            {
                **_module("hasten/core/a.py", "from .b import x"),
                **_module("hasten/core/b.py", "if TYPE_CHECKING:", "    from .a import y"),
            },
            ["hasten.core.a -> hasten.core.b -> hasten.core.a"],
        ),
    ],
    "no_local_imports": [
        (
            _module("hasten/data/a.py", "def f():", "    from hasten.core import errors"),
            ["hasten/data/a.py -> hasten.core.errors"],
        ),
        (
            _module(
                "hasten/data/a.py", "class A:", "    async def f(self):", "        from . import b"
            ),
            ["hasten/data/a.py -> hasten.data.b"],
        ),
        (
            _module("hasten/data/a.py", "f = lambda: importlib.import_module('hasten.core.x')"),
            ["hasten/data/a.py -> hasten.core.x"],
        ),
        (_module("hasten/data/a.py", "m = import_module(f'hasten.{name}')"), ["hasten/data/a.py"]),
    ],
    "file_length": [
        (_module("hasten/core/a.py", *["x = 1"] * 401), ["hasten/core/a.py"]),
        (_module("hasten/core/a.py", "x = '''", *["text"] * 400, "'''"), ["hasten/core/a.py"]),
    ],
    "function_length": [
        ({"hasten/core/a.py": _function(61)}, ["hasten/core/a.py:f"]),
        (
            {
                "hasten/core/a.py": "class A:\n"
                + indent(_function(61, header="def f(self):"), "    ")
            },
            ["hasten/core/a.py:A.f"],
        ),
        ({"hasten/core/a.py": _function(61, header="async def f():")}, ["hasten/core/a.py:f"]),
        (
            {
                "hasten/core/a.py": _function(
                    2, extra="    def g():\n        y = (\n" + "1 +\n" * 58 + "1)\n"
                )
            },
            ["hasten/core/a.py:f", "hasten/core/a.py:f.g"],
        ),
    ],
    "parameter_count": [
        (
            _module("hasten/core/a.py", "def f(a, b, c, d, /, e, f, *, g, h, i): return a"),
            ["hasten/core/a.py:f"],
        ),
        (
            _module("hasten/core/a.py", "def f(a, b, c, d, e, f, g, *args, **kw): return a"),
            ["hasten/core/a.py:f"],
        ),
        (
            _module(
                "hasten/core/a.py",
                "class A:",
                "    @staticmethod",
                "    def f(a, b, c, d, e, f, g, h, i): return a",
            ),
            ["hasten/core/a.py:A.f"],
        ),
        (
            _module(
                "hasten/core/a.py",
                "class A:",
                "    def __init__(self, a, b, c, d, e, f, g, h, i): self.a = a",
            ),
            ["hasten/core/a.py:A.__init__"],
        ),
    ],
    "file_names": [
        (_module("hasten/core/utils.py"), ["hasten/core/utils.py"]),
        (_module("hasten/core/_helpers.py"), ["hasten/core/_helpers.py"]),
        (_module("hasten/common/a.py"), ["hasten/common/a.py"]),
    ],
    "docstrings": [
        ({"hasten/core/a.py": "x = 1\n"}, ["hasten/core/a.py"]),
        ({"hasten/core/__init__.py": ""}, ["hasten/core/__init__.py"]),
        (
            _module("hasten/core/a.py", "class A:", "    def f(self): return 1"),
            ["hasten/core/a.py:A", "hasten/core/a.py:A.f"],
        ),
        (
            _module("hasten/core/a.py", "if x:", "    async def f(): return 1"),
            ["hasten/core/a.py:f"],
        ),
    ],
    "no_pickle": [
        (_module("hasten/core/a.py", "import pickle"), ["hasten/core/a.py -> pickle"]),
        (
            _module("hasten/core/a.py", "def f():", "    from pickle import loads"),
            ["hasten/core/a.py -> pickle"],
        ),
        (
            _module("hasten/core/a.py", "import torch", "torch.load('x')"),
            ["hasten/core/a.py -> torch.load"],
        ),
        (
            _module("hasten/core/a.py", "import torch as t", "save = t.save"),
            ["hasten/core/a.py -> torch.save"],
        ),
        (
            _module("hasten/core/a.py", "from torch import save"),
            ["hasten/core/a.py -> torch.save"],
        ),
        (
            _module("hasten/core/a.py", "import torch", "torch.serialization.load('x')"),
            ["hasten/core/a.py -> torch.load"],
        ),
        (
            _module("hasten/core/a.py", "from torch import serialization as s", "s.load('x')"),
            ["hasten/core/a.py -> torch.load"],
        ),
        (
            _module("hasten/core/a.py", "np.load('x', allow_pickle=True)"),
            ["hasten/core/a.py -> allow_pickle"],
        ),
    ],
    "no_stubs": [
        (_module("hasten/core/a.py", "# TO" + "DO: later"), ["hasten/core/a.py"]),
        (_module("hasten/core/a.py", "x = 1  # FIX" + "ME"), ["hasten/core/a.py"]),
        (
            _module("hasten/core/a.py", "def f():", "    raise NotImplementedError('x')"),
            ["hasten/core/a.py"],
        ),
        (
            _module("hasten/core/a.py", "def f():", "    raise NotImplementedError"),
            ["hasten/core/a.py"],
        ),
        (_module("hasten/core/a.py", "def f(): ..."), ["hasten/core/a.py:f"]),
        (
            _module(
                "hasten/core/a.py",
                "class A:",
                "    def f(self):",
                '        """Doc."""',
                "        pass",
            ),
            ["hasten/core/a.py:A.f"],
        ),
    ],
    "no_machine_paths": [
        (_module("hasten/core/a.py", "x = '/ho" + "me/me/data'"), ["hasten/core/a.py"]),
        (_module("hasten/core/a.py", "# see /wo" + "rk/shared"), ["hasten/core/a.py"]),
        (_module("hasten/core/a.py", "x = 'C:\\\\Us" + "ers\\\\me'"), ["hasten/core/a.py"]),
    ],
    "third_party_homes": [
        (
            _module("hasten/training/a.py", "from rich.table import Table"),
            ["hasten/training/a.py -> rich"],
        ),
        (
            _module("hasten/data/a.py", "def f():", "    import typer"),
            ["hasten/data/a.py -> typer"],
        ),
        (_module("hasten/cli/a.py", "import pydantic"), ["hasten/cli/a.py -> pydantic"]),
        (_module("hasten/config/a.py", "import torch.nn as nn"), ["hasten/config/a.py -> torch"]),
    ],
}

KEEPING = {
    "import_direction": [
        _module("hasten/cli/a.py", "from hasten import train", "from hasten.training import loop"),
        _module("hasten/training/a.py", "from hasten.optim import state", "import torch"),
        _module("hasten/task/a.py", "from hasten.data import rows", "from .b import x"),
        _module("hasten/config/a.py", "from hasten.core.errors import UsageError"),
        _module("hasten/config/a.py", "from hasten.core import errors"),
        _module("hasten/data/a.py", "from hasten import __version__"),
        _module("hasten/__main__.py", "from hasten.cli.main import main"),
        _module(
            "hasten/__init__.py", "def __getattr__(name):", "    from hasten.training import api"
        ),
        _module(
            "hasten/data/a.py", "import hastened.training", "from hasten.core import __version__"
        ),
    ],
    "no_cycles": [
        {
            **_module("hasten/core/a.py", "from hasten.core import b, c"),
            **_module("hasten/core/b.py", "from hasten.core.c import x"),
            **_module("hasten/core/c.py", "import torch"),
        },
        {  # lazy names and their types
            **_module("hasten/__init__.py", "if TYPE_CHECKING:", "    from hasten.cli.a import x"),
            **_module("hasten/cli/a.py", "from hasten import __version__"),
        },
    ],
    "no_local_imports": [
        _module("hasten/cli/a.py", "def f():", "    from hasten.training import api"),
        _module(
            "hasten/__init__.py", "def __getattr__(name):", "    from hasten.training import api"
        ),
        _module("hasten/data/a.py", "def f():", "    import sklearn"),
        _module("hasten/data/a.py", "if True:", "    from hasten.core import errors"),
    ],
    "file_length": [
        _module("hasten/core/a.py", *["x = 1", "", "# comment", "   "] * 400),
        {"hasten/core/a.py": '"""Long.\n' + "text\n" * 500 + '"""\n' + "x = 1\n" * 400},
    ],
    "function_length": [
        {"hasten/core/a.py": _function(60)},
        {"hasten/core/a.py": _function(60, extra="    # comment\n\n" * 30)},
        {"hasten/core/a.py": _function(60, header="@decorated\n@twice\ndef f():")},
    ],
    "parameter_count": [
        _module("hasten/core/a.py", "def f(a, b, c, d, e, f, g, h): return a"),
        _module(
            "hasten/core/a.py", "class A:", "    def f(self, a, b, c, d, e, f, g, h): return a"
        ),
        _module(
            "hasten/core/a.py",
            "class A:",
            "    @classmethod",
            "    def f(cls, a, b, c, d, e, f, g, h): return a",
        ),
    ],
    "file_names": [_module("hasten/core/files.py"), _module("hasten/core/utilities_of_war.py")],
    "docstrings": [
        _module("hasten/core/a.py", "def _f(): return 1"),
        _module("hasten/core/a.py", "class _A:", "    def f(self): return 1"),
        _module(
            "hasten/core/a.py",
            "def f():",
            '    """Doc."""',
            "    def g(): return 1",
            "    return g",
        ),
        _module(
            "hasten/core/a.py", "class A:", '    """Doc."""', "    def __len__(self): return 1"
        ),
        _module("hasten/core/a.py", "@overload", "def f(x: int) -> int: ..."),
        _module(
            "hasten/core/a.py",
            "class A:",
            '    """Doc."""',
            "    @v.setter",
            "    def v(self, x): self.x = x",
        ),
    ],
    "no_pickle": [
        _module(
            "hasten/core/a.py", "from safetensors.torch import load", "load('x')", "import torch.nn"
        ),
        _module(
            "hasten/core/a.py", "import torch", "torch.nn.load", "model.save('x')", "json.load(f)"
        ),
        _module("hasten/core/a.py", "np.load('x', allow_pickle=False)"),
    ],
    "no_stubs": [
        _module("hasten/core/a.py", "class A(Protocol):", "    def f(self): ..."),
        _module("hasten/core/a.py", "class A(typing.Protocol[T]):", "    def f(self): ..."),
        _module("hasten/core/a.py", "class A:", "    @abstractmethod", "    def f(self): ..."),
        _module("hasten/core/a.py", "@typing.overload", "def f(x): ..."),
        _module("hasten/core/a.py", "def f():", '    """Does nothing, on purpose."""'),
        _module(
            "hasten/core/a.py",
            "x = 'mastodon'",
            "try:",
            "    f()",
            "except NotImplementedError: pass",
        ),
    ],
    "no_machine_paths": [
        _module("hasten/core/a.py", "x = 'https://example.org/home/x'", "y = 'data/work/x'"),
        _module("hasten/core/a.py", "x = '/proc/meminfo'", "y = '~/work/x'"),
    ],
    "third_party_homes": [
        _module("hasten/cli/a.py", "import rich", "from typer import Option"),
        _module("hasten/config/a.py", "from pydantic import BaseModel", "import yaml"),
        _module("hasten/model/a.py", "import torch", "import richer"),
    ],
}


def test_every_rule_is_tried_both_ways():
    assert set(BREAKING) == set(KEEPING) == set(RULES)


@pytest.mark.parametrize(
    ("rule", "files", "expected"),
    [(rule, files, expected) for rule, cases in BREAKING.items() for files, expected in cases],
)
def test_a_breach_is_found(rule, files, expected):
    assert sorted(set(_breaches(rule, files))) == sorted(expected)


@pytest.mark.parametrize(
    ("rule", "files"), [(rule, files) for rule, cases in KEEPING.items() for files in cases]
)
def test_what_is_allowed_passes(rule, files):
    assert _breaches(rule, files) == []


def test_exemptions_exempt_exactly_and_are_reported_when_unneeded():
    sources = _sources({**_module("hasten/core/utils.py"), **_module("hasten/core/common.py")})
    needed = Exemption("file_names", "hasten/core/utils.py", "a reason of four words")
    unneeded = Exemption("file_names", "hasten/core/gone.py", "a reason of four words")
    other_rule = Exemption("no_stubs", "hasten/core/common.py", "a reason of four words")
    failures, left = check("file_names", sources, (needed, unneeded, other_rule))
    assert failures == ["hasten/core/common.py: is called 'common'"]
    assert left == [unneeded]


def test_sources_are_read_from_disk(tmp_path):
    for path in ("hasten/__init__.py", "hasten/core/__init__.py", "hasten/core/deep/a.py", "x.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('"""Döc."""\n', encoding="utf-8")
    sources = load_sources(tmp_path)
    assert [(source.path, source.module, source.package) for source in sources] == [
        ("hasten/__init__.py", "hasten", "__init__"),
        ("hasten/core/__init__.py", "hasten.core", "core"),
        ("hasten/core/deep/a.py", "hasten.core.deep.a", "core"),
    ]
