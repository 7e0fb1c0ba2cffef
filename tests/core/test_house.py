"""Who may import whom: core, engines, front ends; planning and convert beside them; the command line on top."""

import ast
import sys
from pathlib import Path

import pytest

import adafactor

SOURCE = Path(adafactor.__file__).parent

ENGINES = {"engine.torch": {"torch", "triton"}, "engine.xla": {"jax", "jaxlib"}, "engine.tensorflow": {"tensorflow"}}
FRONT_ENDS = {
    "torch": {"engine.torch", "torch"},
    "optax": {"engine.xla", "jax", "optax"},
    "keras": {*ENGINES, "keras", "torch", "jax", "tensorflow"},
}
#: Front ends of PyTorch that speak the words of a host, over the front end of PyTorch.
HOSTS = {host: {"engine.torch", "adafactor.torch", "torch", host} for host in ("transformers", "timm", "lightning")}
FRAMEWORKS = set().union(*ENGINES.values(), ["keras", "optax"])
FILES = {"h5py", "msgpack", "safetensors", "ml_dtypes", "orbax"}  # each for its own files, imported when one is met

#: By package: the packages of ours (``adafactor.``) and of others that its modules may import, NumPy and itself apart.
ALLOWED = {
    "": {"adafactor.core", "adafactor.planning"},  # planning when it is asked for
    "core": set(),
    **{engine: {"adafactor.core", *frameworks} for engine, frameworks in ENGINES.items()},
    **{
        name: {"adafactor.core"} | {f"adafactor.{part}" if part in ENGINES else part for part in parts}
        for name, parts in (FRONT_ENDS | HOSTS).items()
    },
    "planning": {"adafactor.core", "torch", "h5py"},  # to read a file, in a process of its own or by h5py
    "convert": {"adafactor.core", *(f"adafactor.{name}" for name in [*ENGINES, *FRONT_ENDS]), *FRAMEWORKS, *FILES},
    "cli": {"adafactor.*", "matplotlib", "transformers", *FRAMEWORKS},  # bench times peers
}
#: What may be imported with a module rather than in a function, where that is less.
AT_ONCE = {
    "planning": {"adafactor.core"},
    "keras": ALLOWED["keras"] - {"torch", "jax", "tensorflow"},
    **{
        f"keras.step_{backend}": ALLOWED["keras"] for backend in ("torch", "jax", "tensorflow")
    },  # imported in functions
}


def package(module):
    """ "core" of "adafactor.core.native", "engine.xla" of "adafactor.engine.xla.step", "" of "adafactor"."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2] if parts[:1] == ["engine"] else parts[:1])


def imported(source):
    """(module, whether it is imported with the module that has this source) for every import statement."""
    tree = ast.parse(source)
    inner = {
        node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(f)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            whole = f"{node.module}." if node.module in ("adafactor", "adafactor.engine") else None
            names = [whole + alias.name for alias in node.names] if whole else [node.module]
        yield from ((name, node not in inner) for name in names)


def violations(module, source):
    here = package(module)
    for name, at_once in imported(source):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top == "numpy":
            continue
        ours = top == "adafactor"
        there = f"adafactor.{package(name)}" if ours else top
        if ours and (package(name) in ("", here) or not (SOURCE / package(name).replace(".", "/")).exists()):
            continue  # itself, adafactor, or a name that adafactor exports
        allowed = ALLOWED[here]
        if at_once:
            allowed = AT_ONCE.get(module.removeprefix("adafactor."), AT_ONCE.get(here, allowed))
        if there not in allowed and not (ours and "adafactor.*" in allowed):
            yield f"{module} imports {name}"


def modules():
    """The path of every module."""
    return {
        ".".join(("adafactor", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in SOURCE.rglob("*.py")
    }


def test_every_import_goes_down():
    packages = set(map(package, modules()))
    assert packages >= {"", "core", "planning", "convert", "cli", *FRONT_ENDS, *HOSTS}
    assert [v for module, path in modules().items() for v in violations(module, path.read_text(encoding="utf-8"))] == []


def circles(sources):
    """The modules that import themselves by way of others, and who imports them; annotations and functions count."""
    below = {}
    for module, source in sources.items():
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        names = {(f"{node.module}.{alias.name}", node.module) for node in nodes for alias in node.names}
        below[module] = {inner if inner in sources else outer for inner, outer in names} & sources.keys() - {module}
    while leaves := {module for module, names in below.items() if not names & below.keys()}:
        below = {module: names for module, names in below.items() if module not in leaves}
    return below.keys()


def test_no_module_imports_itself_by_way_of_others():
    assert circles({module: path.read_text(encoding="utf-8") for module, path in modules().items()}) == set()
    assert circles({"a": "from b import f", "b": "def g():\n    from a import h", "c": "from a import h"}) >= {"a", "b"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("adafactor.core.native", "import torch"),
        ("adafactor.core.native", "def f():\n    from adafactor.planning import plan"),
        ("adafactor.engine.xla.step", "import torch"),
        ("adafactor.engine.xla.step", "from adafactor.engine import torch"),
        ("adafactor.engine.torch.cpu", "from adafactor.torch.optimizer import Adafactor"),
        ("adafactor.torch.optimizer", "from adafactor.convert.torch import read"),
        ("adafactor.optax.update", "from adafactor import planning"),
        ("adafactor.keras.step", "import torch"),
        ("adafactor.planning.usage", "import h5py"),
        ("adafactor.convert.torch", "from adafactor.cli.terminal import table"),
        ("adafactor", "import adafactor.torch"),
        ("adafactor.core.native", "import scipy"),
    ],
)
def test_the_check_can_fail(module, source):
    assert len(list(violations(module, source))) == 1


def test_what_is_allowed_passes():
    lazy = "def f():\n    import torch\n"
    assert not list(violations("adafactor.keras.step_torch", lazy + "from adafactor.engine.torch import cpu"))
    assert not list(violations("adafactor.cli.convert", "from adafactor import convert, __version__\nimport os"))
