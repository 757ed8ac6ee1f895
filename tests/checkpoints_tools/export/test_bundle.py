"""Programs put together from modules: what is followed, left out, evaluated, renamed and refused."""

import ast
import re
import textwrap

import pytest

from checkpoints_tools.export import bundle as module
from checkpoints_tools.export.bundle import BundleError, BundleSpec, bundle
from checkpoints_tools.export.partial_evaluation import Known, PartialEvaluator
from checkpoints_tools.export.source_text import wrapped
from tests.raising import raises

FILES = {
    "ours.kernels": """
        import triton

        def has_kernel():
            return triton is not None

        def fast(x):
            import triton.language
            return x
        """,
    "ours.scan": """
        import math
        from typing import NamedTuple

        from ours.errors import WrongError
        from ours.kernels import fast, has_kernel

        class Forms(NamedTuple):
            slow: object
            kernel: object

        def _half(x):
            return x / 2

        def scan(x, *, backend="auto"):
            '''Run it.

            Args:
                x: What.
            '''
            if x < 0:
                raise WrongError(x)
            if has_kernel() and backend == "auto":
                return fast(x)
            # As slow as it is exact.
            forms = Forms(slow=math.sqrt, kernel=fast)
            scale, other = backend == "kernel", _half(x)
            if scale:
                return fast(other)
            return forms.slow(other)
        """,
    "ours.layer": """
        from dataclasses import dataclass

        from ours.scan import scan as run

        def _half(x):
            return x // 2

        @dataclass(kw_only=True)
        class Options:
            seed: int = 0
            size: int = 1
            context: object = None

            @property
            def shared(self):
                return self.context is not None

            def unused(self):
                return self.seed

        class Layer:
            def __call__(self, x, options: Options):
                if options.shared:
                    x = options.context.exchange(x)
                return run(x, backend="auto") + _half(options.size)
        """,
    "ours.root": """
        from ours.layer import Layer, Options
        from ours.other import extra

        class Model:
            def run(self, x):
                return Layer()(x, Options(size=extra(), seed=4))
        """,
    "ours.other": "",
    "ours.instead": """
        def extra():
            return 3
        """,
    "ours.errors": """
        class WrongError(Exception):
            pass
        """,
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    def make(*, files=FILES, **changes):
        for name, text in {"ours.__init__": "", **files}.items():
            path = tmp_path / (name.replace(".", "/") + ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(text))
        monkeypatch.setattr(module, "_ROOT", tmp_path)
        known = Known(calls={"has_kernel": False}, attributes={}, fields={"Options": {"context": None}})
        settings = {
            **{"root": "ours.root", "names": ["Model"], "packages": ("ours",), "edits": {}, "whole": "ours.root"},
            **{"replaced": {"WrongError": "ValueError"}, "optional": {"extra": "ours.instead:extra"}},
            **{"dropped": frozenset(), "bare": frozenset(), "known": known},
        }
        return BundleSpec(**{**settings, **changes})

    return make


def test_a_program_holds_what_is_reached_and_computes_the_same(recipe):
    source = bundle(recipe())
    names: dict = {}
    exec(source, names)
    assert names["Model"]().run(8.0) == 2.0 + 1
    with pytest.raises(ValueError, match="-1"):
        names["Model"]().run(-1.0)
    defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert defined == {"Model", "Layer", "Options", "Forms", "scan", "_half", "_layer_half"}
    for absent in ("kernel", "context", "triton", "unused", "seed", "Args:", "backend", "run(x, "):
        assert absent not in source, absent
    assert "# As slow as it is exact.\n" in source
    assert "\nimport math\n" in source


def test_what_modules_and_classes_give_is_followed(recipe):
    files = {
        "ours.sizes": """
            SMALL, LARGE = 2, 3

            class Options:
                @property
                def options(self):
                    return {"factor": self.factor, "context": self.context}

                @classmethod
                def of(cls, number, context):
                    found = cls()
                    found.factor, found.number = number if context is None else 0, number
                    return found

            def grown(number, *, factor, context):
                return number * factor if context is None else context(number)
            """,
        "ours.root": """
            from ours import sizes

            class Model:
                def run(self, options: sizes.Options):
                    return sizes.grown(options.number, **options.options)

                def make(self):
                    return self.run(sizes.Options.of(sizes.LARGE, None))
            """,
    }
    source = bundle(recipe(files=files))
    names: dict = {}
    exec(source, names)
    assert names["Model"]().make() == 9
    for absent in ("SMALL", "context", "**"):
        assert absent not in source, absent


def test_an_option_that_an_export_has_not_leaves_no_trace(recipe):
    files = {
        "ours.kinds": """
            class Kind:
                size = 2

            def times(kind: Kind | None, x):
                return x if kind is None else x * kind.size

            def scaled(x, *, kind: Kind | None = None, more=1):
                return times(kind, x) + more
            """,
        "ours.root": """
            from ours.kinds import Kind, scaled

            class Model:
                kind: Kind | None = None

                def run(self, x, kind: Kind | None = None):
                    kind = self.kind
                    options: dict = {"kind": kind, "more": 3}
                    if x > 1:
                        return scaled(x, **options)
                    return scaled(-x, **options)
            """,
    }
    source = bundle(recipe(files=files, absent=frozenset({"kind"})))
    names: dict = {}
    exec(source, names)
    assert (names["Model"]().run(2), names["Model"]().run(1)) == (5, 2)
    assert not re.search(r"\b[Kk]ind\b", source)
    files["ours.root"] = files["ours.root"].replace("kind = self.kind", "kind, x = x, x")
    with raises(BundleError, "kind"):
        bundle(recipe(files=files, absent=frozenset({"kind"})))


def test_what_is_missing_or_ambiguous_is_refused(recipe):
    for files, words in (
        ({"ours.root": "from ours.layer import Layer\nclass Model(Layer):\n    pass\n", "ours.layer": ""}, "Layer"),
        ({"ours.root": "from ours.nowhere import f\ndef Model():\n    return f()\n"}, "no module ours.nowhere"),
        ({"ours.root": "from ours import other\ndef Model():\n    return other.f()\n"}, "other"),
        ({"ours.root": "def Model():\n    import math\n    return math.pi\n"}, "imports inside of a function"),
        (
            {
                "ours.root": "from ours.layer import f\nfrom ours.scan import g\ndef Model():\n    return f() + g()\n",
                "ours.layer": "def f():\n    return h()\ndef h():\n    return 1\n",
                "ours.scan": "def g():\n    return h()\ndef h():\n    return 2\n",
            },
            r"\bh .*ours.scan",
        ),
    ):
        with pytest.raises(BundleError, match=words):
            bundle(recipe(files=files))
    with raises(BundleError, "absent", "does not hold"):
        bundle(recipe(files=FILES, edits={"ours.root": [("absent", "")]}))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("return a or 4", "return a or 4"),
        ("return a and False", "return False"),
        ("return a or None", "return a or None"),
        ("return f() and a", "return a"),
        ("return None is not None or a", "return a"),
        ("x = None\nreturn a if x is None else x", "return a"),
        ("x = None\nx = a\nreturn x is None", "x = None\nx = a\nreturn x is None"),
        ("x = 1\ndef g(x):\n    return x\nreturn g(a)", "x = 1\ndef g(x):\n    return x\nreturn g(a)"),
        ("a, b = (b, None)\nreturn a, b", "a = b\nb = None\nreturn (a, b)"),
        ("b, a = (None, b)\nreturn a, b", "b, a = (None, b)\nreturn (a, b)"),
        ("if f():\n    return a\nelse:\n    a = 1\nreturn a + 1", "return a"),
        ("if a:\n    b = g(a)\nelif f():\n    return 2\nreturn 3", "if not a:\n    return 2\nreturn 3"),
        ("for x in a:\n    c = None", "for x in a:\n    pass"),
        ("b = f()\nreturn a if b else 2", "return a"),
        ("if a:\n    b = f()\nreturn b", "if a:\n    b = True\nreturn b"),
        ("c = b\nb = f()\nreturn b, c", "c = b\nb = True\nreturn (b, c)"),
        ("c = {'x': a, **{'y': f()}}\nc['z'] = 3\nreturn g(b, **c)", "return g(b, x=a, y=True, z=3)"),
        ("return g(**{k: v for k, v in {'x': a, 'y': b}.items() if k != 'x'})", "return g(y=b)"),
        ("c = {'x': a}\nreturn g(**c), c", "c = {'x': a}\nreturn (g(**c), c)"),
        (
            "c: dict = {'x': a.y, 'z': b}\nif a:\n    return g(**c)\nreturn k(b, **c)",
            "if a:\n    return g(x=a.y, z=b)\nreturn k(b, x=a.y, z=b)",
        ),
        ("if a:\n    c = {'x': a[0]}\n    return g(**c)\nreturn b", "if a:\n    return g(x=a[0])\nreturn b"),
        ("c = {'x': b}\nb = 2\nreturn g(**c)", "c = {'x': b}\nb = 2\nreturn g(**c)"),
        ("return g(**{**a})", "return g(**a)"),
        ("c = None\nif c is not None:\n    c = a[c]\nreturn c or b", "return b"),
        ("c = None\nif a:\n    c = b\nreturn c", "c = None\nif a:\n    c = b\nreturn c"),
        ("return f'{a!r} {f()} {None:>3}'", "return f'{a!r} True {None:>3}'"),
        ("assert f() is True\nassert a", "assert a"),
        ("return isinstance(None, Kind) or a", "return a"),
    ],
)
def test_evaluation_keeps_the_value(before, after):
    tree = ast.parse("def h(a, b):\n" + textwrap.indent(before, "    "))
    for _ in range(2):
        PartialEvaluator(Known(calls={"f": True} if "f()" in before else {}, attributes={}, fields={})).visit(tree)
    expected = ast.parse("def h(a, b):\n" + textwrap.indent(after, "    "))
    assert ast.unparse(tree) == ast.unparse(expected)


@pytest.mark.parametrize(
    "code",
    [
        "return function_of_a_long_name(" + ", ".join(f"argument_{i}" for i in range(6)) + ")",
        "return function_of_a_long_name(" + ", ".join(f"argument_{i}" for i in range(30)) + ")",
        "x = {" + "very_long_name_of_a_key: very_long_name_of_a_value for very_long_name_of_a_key, "
        "very_long_name_of_a_value in some_dictionary.items() if very_long_name_of_a_key != 'unwanted'}",
        "x = f(a, (b, 'text, with (brackets', [" + ", ".join(f"item_{i}" for i in range(20)) + "]), key=g(1, 2))",
    ],
)
def test_long_statements_are_broken_and_mean_the_same(code):
    lines = wrapped(code, 8)
    assert max(map(len, lines)) <= 120 or " for " in code
    assert len(lines) > 1 or len(code) < 110
    assert ast.dump(ast.parse(textwrap.dedent("\n".join(lines)))) == ast.dump(ast.parse(code))
