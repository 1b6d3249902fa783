"""The plan of the house holds: which room may import which, how long modules and functions are, what an import may do."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = "qlr_jax.formats.qlr.modeling_qlr"  # one file, because it travels alone with every compressed model
MODULE_LINES, FUNCTION_LINES = 400, 60

# From the top down: a room imports rooms below it only. Modules outside a room stand here by their own name.
ROOMS = (
    "qlr_jax.cli",
    "qlr_jax.job",
    "qlr_jax.pipelines",
    "qlr_jax.run",
    "qlr_jax.cluster",
    "qlr_jax.report",
    "qlr_jax.cost",
    "qlr_jax.settings",
    "qlr_jax.serving",
    "qlr_jax.adaptation",
    "qlr_jax.sensitivity",
    "qlr_jax.evaluation",
    "qlr_jax.calibration",
    "qlr_jax.export",
    "qlr_jax.formats",
    "qlr_jax.models",
    "qlr_jax.core",
    "qlr_jax.native",
    "qlr_jax.engine",
    "qlr_jax.locks",
    "qlr_jax.paths",
    "qlr_jax.on_demand",
    "qlr_jax.progress",
    "qlr_jax.errors",
    "qlr_jax",
    "allocators",
)


def _modules() -> dict[str, Path]:
    """Name of every module of the library -> its file."""
    found = {}
    for package in ("qlr_jax", "allocators"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def _homes(tree: ast.Module) -> dict[str, str]:
    """The table of names that a package resolves on first use (PEP 562)."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and ast.unparse(node.targets[0]) == "_HOMES":
            return ast.literal_eval(node.value)
    return {}


HOMES = {name: _homes(tree) for name, tree in TREES.items() if "__init__.py" in MODULES[name].name}


def _imports(name: str) -> set[str]:
    """Full names of what a module imports anywhere, functions included: our modules by module, all others as written."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [*package.split(".")[: len(package.split(".")) - node.level + 1], base]))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else HOMES.get(base, {}).get(alias.name, base))
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "qlr_jax" and node.attr in HOMES["qlr_jax"]:
            found.add(HOMES["qlr_jax"][node.attr])
    return found - {name}


IMPORTS = {name: _imports(name) for name in MODULES}


def _imports_at_once(name: str, package: str) -> bool:
    """Whether importing a module imports a package, which may not be installed."""
    lines = (ast.unparse(node) for node in TREES[name].body if isinstance(node, (ast.Import, ast.ImportFrom)))
    return any(re.match(rf"(from|import) {package}\b", line) for line in lines)


# What vLLM alone imports; tests/test_formats_vllm_plugin.py does so with a stand-in.
FOR_VLLM = {name for name in MODULES if _imports_at_once(name, "vllm")}


def _room(name: str) -> str:
    return max((room for room in ROOMS if f"{name}.".startswith(f"{room}.")), key=len)


def _circles() -> set[str]:
    """Every set of modules that import one another in a circle (strongly connected, more than one), as a sorted line."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = set()

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(IMPORTS[name] & MODULES.keys()):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            circle = sorted(stack[at:])
            del stack[at:]
            if len(circle) > 1:
                found.add(" ".join(circle))

    for name in MODULES:
        if name not in index:
            visit(name)
    return found


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        inner = f"{prefix}.{node.name}" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else prefix
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield inner, node
        yield from _functions(node, inner)


def test_every_module_is_in_a_room():
    outside = {name for name in MODULES if _room(name) == "qlr_jax" and name != "qlr_jax"}
    assert not outside, "new top-level modules or rooms: give each its place in ROOMS and in docs/architecture.md"


def test_imports_run_downward():
    above = {room: at for at, room in enumerate(ROOMS)}
    upward = {
        f"{name} -> {other}"
        for name in MODULES
        for other in IMPORTS[name] & MODULES.keys()
        if name != "qlr_jax" and above[_room(other)] < above[_room(name)]
    }
    assert not upward, sorted(upward)


def test_only_the_plugin_imports_vllm():
    assert {f"qlr_jax.formats.qlr.vllm_plugin.{name}" for name in ("config", "methods")} == FOR_VLLM


def test_no_circles():
    assert not _circles()


def test_what_rooms_may_import_from_outside():
    foreign = set()
    for name in MODULES:
        heads = {other.partition(".")[0] for other in IMPORTS[name]}
        if _room(name) == "allocators":
            foreign |= {(name, h) for h in heads - sys.stdlib_module_names - {"numpy", "scipy", "allocators"}}
        if _room(name) == "qlr_jax.core":
            foreign |= {(name, h) for h in heads & {"flax", "transformers", "torch", "tokenizers", "safetensors"}}
            foreign |= {(name, o) for o in IMPORTS[name] & MODULES.keys() if _room(o) in ("qlr_jax.models", "qlr_jax.formats")}
    assert not foreign


def test_no_module_is_long():
    long = {name for name, path in MODULES.items() if len(path.read_text().splitlines()) > MODULE_LINES and name != RUNTIME}
    assert not long


def test_long_functions_say_why():
    long = set()
    for name, tree in TREES.items():
        lines = MODULES[name].read_text().splitlines()
        for inner, node in _functions(tree):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if node.end_lineno - node.lineno + 1 > FUNCTION_LINES and not lines[first - 2].lstrip().startswith("#"):
                long.add(name + inner)
    assert not long, "say in one comment line directly above `def` why the function is best read in one piece"


@pytest.mark.parametrize("name", sorted(name for name, path in MODULES.items() if path.name == "__init__.py"))
def test_rooms_say_what_they_are(name):
    line = (ast.get_docstring(TREES[name]) or "").partition("\n")[0]
    assert re.fullmatch(r"[A-Z`].{10,}[.:]", line), f"{name} begins with one line that says what is in it"


def _fresh(code: str) -> None:
    """Run code in a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_importing_the_package_is_light():
    _fresh("import sys, qlr_jax\nassert not {'jax', 'torch', 'numpy', 'transformers'} & sys.modules.keys()")


def _run_on_import(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run as their module is imported: none in a function, none for type checkers alone."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, (ast.Import, ast.ImportFrom)):
            yield inner
        elif isinstance(inner, ast.If) and ast.unparse(inner.test) == "TYPE_CHECKING":
            yield from _run_on_import(ast.Module(inner.orelse, []))
        elif not isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _run_on_import(inner)


def test_an_import_changes_nothing_in_its_host():
    """Settings of JAX, the environment, signals and logging are after importing everything what they were before."""
    outside = {
        line
        for name, tree in TREES.items()
        for line in map(ast.unparse, _run_on_import(tree))
        if name not in FOR_VLLM and not re.search(r"qlr|allocators|__future__", line)
    }
    _fresh(
        f"outside, ours = {sorted(outside)!r}, {sorted(n for n in MODULES if not n.endswith('__main__') and n not in FOR_VLLM)!r}\n"
        "import contextlib, importlib, locale, logging, os, signal, sys\n"
        "for line in outside:  # what other packages do is theirs\n"
        "    with contextlib.suppress(ImportError):\n"
        "        exec(line, {})\n"
        "import jax\n"
        "import numpy as np\n"
        "from jax._src import xla_bridge\n"
        "def host():\n"
        "    signals = {s: signal.getsignal(s) for s in signal.valid_signals()}\n"
        "    loggers = {n: logging.getLogger(n).level for n in (None, 'jax', 'transformers', 'torch', 'absl')}\n"
        "    return {**jax.config.values, 'environment': dict(os.environ), 'signals': signals, 'loggers': loggers,\n"
        "            'path': list(sys.path), 'numpy': np.geterr(), 'locale': locale.getlocale(),\n"
        "            'hooks': (sys.excepthook, sys.displayhook), 'recursion': sys.getrecursionlimit()}\n"
        "before = host()\n"
        "for name in ours:\n"
        "    importlib.import_module(name)\n"
        "after = host()\n"
        "changed = [k for k in before if before[k] != after[k]]\n"
        "assert not changed, [(k, before[k], after[k]) for k in changed]\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
    )
