"""Laws of the layout, read from the source: nothing here is imported or run."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dora_kernels"
# From the ground up; a module may import what stands before its own line, and packages their own modules.
LAYERS = [
    {"versions", "chunks", "offloading", "parents", "quantized"},
    {"freezable"},
    {"gemm", "config"},
    {"kernels", "reference"},
    {"dispatch"},
    {"autograd"},
    {"functional"},
    {"linear"},
    {"explain", "frozen", "targets", "tying", "dequantizing"},
    {"patch"},
    {"merging", "adapter_config"},
    {"adapter_files"},
    {"adapter"},
    {"interop"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# One table per twin: device functions and launch data of the kernels need no reference.
TWINS = ["cast", "merge", "nf4", "rescale_bwd", "rescale_fwd", "rounding", "weight_norm"]
# No operation of its own: what the launchers and kernels share.
NO_TWIN = {"__init__", "addresses", "launch", "tile"}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def sources(package=PACKAGE):
    return sorted(package.rglob("*.py"))


def room(path):
    """The module or sub-package directly inside the package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path):
    """The rooms of the package that a file imports, anywhere in it."""
    inside = ("dora_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)
    rooms = set()
    for node in ast.walk(parse(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*inside[: -node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        rooms |= {name[1] for name in names if name[0] == "dora_kernels" and len(name) > 1}
    return rooms


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = room(path)
    assert own in LEVEL, f"{own} is a new room: give it a place in LAYERS"
    for other in imported_rooms(path) - {own}:
        assert other in LEVEL, f"{path} imports {other}, which has no place in LAYERS"
        assert LEVEL[other] < LEVEL[own], f"{own} may not import {other}"


def test_the_import_reader_reads():
    assert imported_rooms(PACKAGE / "dispatch.py") >= {"kernels", "reference", "versions"}
    assert imported_rooms(PACKAGE / "kernels" / "rescale_bwd.py") >= {"gemm", "kernels"}


@pytest.mark.parametrize("stem", TWINS)
def test_the_twins_do_not_know_each_other(stem):
    assert "reference" not in imported_rooms(PACKAGE / "kernels" / f"{stem}.py")
    assert "kernels" not in imported_rooms(PACKAGE / "reference" / f"{stem}.py")


def test_only_dispatch_sees_both():
    for path in sources():
        if room(path) not in ("dispatch", "kernels", "reference"):
            assert not imported_rooms(path) & {"kernels", "reference"}, path


def functions(path):
    return {node.name: node for node in parse(path).body if isinstance(node, ast.FunctionDef)}


def signature(function):
    """Names in order, with what is keyword-only and the defaults."""
    arguments = function.args
    return (
        [argument.arg for argument in arguments.args],
        [argument.arg for argument in arguments.kwonlyargs],
        [ast.dump(default) for default in arguments.defaults],
        [default and ast.dump(default) for default in arguments.kw_defaults],
        function.returns and ast.unparse(function.returns),
    )


def exported(package):
    """The names in `__all__`."""
    for node in parse(PACKAGE / package / "__init__.py").body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{package} has no __all__")


def test_the_twins_export_the_same_operations():
    assert exported("kernels") - {"interpreted"} == exported("reference")


@pytest.mark.parametrize("name", sorted(exported("reference")))
def test_twin_operations_have_one_signature(name):
    stem = {"scaled_cast": "cast", "decode": "nf4"}.get(name, name)
    kernel, reference = (functions(PACKAGE / package / f"{stem}.py")[name] for package in ("kernels", "reference"))
    assert signature(kernel) == signature(reference)
    assert ast.get_docstring(kernel) == ast.get_docstring(reference), "one description for both"


def test_every_kernel_file_has_its_twin():
    kernels, references = ({path.stem for path in sources(PACKAGE / name)} for name in ("kernels", "reference"))
    assert kernels - NO_TWIN == references - {"__init__"} == set(TWINS)


FORBIDDEN = {
    "environment variables": r"os\.environ|os\.getenv|\bgetenv\(",
    # Of Triton, and PyTorch's operations that sum by them on a GPU.
    "float atomics": r"atomic|index_add|scatter_add|index_put|scatter_reduce",
    "version counters": r"\._version\b",
    "the autotuner": r"\bautotune\b",
    # Whoever adds one holds it to torch.library.opcheck.
    "custom operators": r"torch\.library|custom_op",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_the_engine_does_without(what):
    for path in sources():
        # Unparsed, so that comments may say why; docstrings are text too.
        code = "\n".join(ast.unparse(node) for node in parse(path).body if not isinstance(node, ast.Expr))
        assert not re.search(FORBIDDEN[what], code), f"{path} uses {what}"


def test_every_dot_says_its_precision():
    dots = 0
    for path in sources(PACKAGE / "kernels"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                dots += 1
                assert "input_precision" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
    assert dots


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_globals_change(path):
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno}"
