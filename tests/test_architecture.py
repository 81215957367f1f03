"""Laws of the layout, read from the source: nothing here is imported or run."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dora_kernels"
OPS = PACKAGE / "ops"
# From the ground up: a module imports what stands on lower floors, or in its own folder.
FLOORS = [
    {"versions", "config"}, {"ops"}, {"layers", "doctor"}, {"blocks"}, {"models", "peft"}, {"adapters"},
    {"__init__", "__main__"},
]  # fmt: skip
# The same inside `ops/`, whose modules build on each other.
OPS_FLOORS = [
    {"__init__", "base_weights", "checkpointing", "chunked", "convolution", "gpus", "output", "types"},
    {"accumulation", "call", "grouped"},
    {"checks", "kernels", "problem", "recomputation", "reference", "stacks"},
    {"expert_shapes", "kept_weight", "overhead", "quantiser"},
    {"custom_operator", "served"},
    {"dispatch", "forms", "members"},
    {"merged_members"},
    {"gate_up", "requantize", "siblings"},
    {"dora_conv", "dora_embedding", "dora_experts", "dora_linear", "dora_mlp", "dora_siblings", "dora_weight"},
]
# Device functions and launch data of the kernels need no reference.
TWINS = [
    "activations", "base_weight", "cast", "expert_glu_bwd", "expert_glu_fwd", "expert_norm", "expert_rescale_bwd",
    "expert_rescale_fwd", "expert_wgrad", "glu_bwd", "glu_fwd", "kept_merge", "kept_norm", "merge", "rescale_bwd",
    "rescale_fwd", "rounding", "stacked_merge", "stacked_norm", "weight_norm",
]  # fmt: skip
NO_TWIN = {
    "__init__", "blocks", "chunks", "expert_sums", "expert_tiles", "floats", "fp4", "fp8", "int4", "launch", "lora_dot",
}  # fmt: skip


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def sources(package=PACKAGE):
    return sorted(package.rglob("*.py"))


def imports(path):
    """What a file of the package imports from it, as paths of names: ("ops", "dispatch", "choose")."""
    inside = ("dora_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)
    names = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*inside[: -node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            names += [[*base, alias.name] for alias in node.names]
    return {tuple(name[1:]) for name in names if name[0] == "dora_kernels" and len(name) > 1}


def check_floors(floors, own, others, path):
    level = {name: number for number, names in enumerate(floors) for name in names}
    for name in {own, *others}:
        assert name in level, f"{name} is new: give it a floor"
    for other in others - {own}:
        assert level[other] < level[own], f"{path}: {own} may not import {other}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts
    check_floors(FLOORS, room[0], {name[0] for name in imports(path)}, path)
    if room[0] == "ops":
        check_floors(OPS_FLOORS, room[1], {name[1] for name in imports(path) if name[0] == "ops"}, path)


def test_the_import_reader_reads():
    assert {name[:2] for name in imports(OPS / "dispatch.py")} >= {("ops", "kernels"), ("ops", "reference")}
    assert ("ops", "chunked", "mm_fp32") in imports(OPS / "kernels" / "rescale_bwd.py")
    with pytest.raises(AssertionError, match="may not import"):
        check_floors(FLOORS, "ops", {"layers"}, "x.py")


def test_packages_of_the_same_name_are_the_installed_ones():
    """`dora_kernels/peft` and `tests/peft` must not stand in PEFT's place, nor `tests/bench` in the benchmarks'."""
    import peft

    import bench
    import training

    assert "site-packages" in peft.__file__ or "dist-packages" in peft.__file__
    assert Path(bench.__file__).parent == ROOT / "bench" and Path(training.__file__).parent == ROOT / "training"


@pytest.mark.parametrize("folder", ["training", "bench"])
def test_what_is_installed_under_another_name_imports_itself_relatively(folder):
    """`training` is installed as `dora_training`, `bench` as `dora_bench`."""
    names = {"training", "bench", "dora_training", "dora_bench"}
    for path in sources(ROOT / folder):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                found = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not names & {name.partition(".")[0] for name in found}, f"{path}:{node.lineno}"


@pytest.mark.parametrize("stem", TWINS)
def test_the_twins_do_not_know_each_other(stem):
    for own, other in (("kernels", "reference"), ("reference", "kernels")):
        assert ("ops", other) not in {name[:2] for name in imports(OPS / own / f"{stem}.py")}


def test_only_dispatch_and_its_operator_see_both():
    both = {OPS / "dispatch.py", OPS / "custom_operator.py"}
    for path in {*sources()} - both:
        if path.parent not in (OPS / "kernels", OPS / "reference"):
            assert not {name[:2] for name in imports(path)} & {("ops", "kernels"), ("ops", "reference")}, path


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
    for node in parse(OPS / package / "__init__.py").body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{package} has no __all__")


def test_the_twins_export_the_same_operations():
    assert exported("kernels") - {"interpreted"} == exported("reference")


@pytest.mark.parametrize("name", sorted(exported("reference")))
def test_twin_operations_have_one_signature(name):
    stem = {"scaled_cast": "cast", "decode": "base_weight"}.get(name, name)
    kernel, reference = (functions(OPS / package / f"{stem}.py")[name] for package in ("kernels", "reference"))
    assert signature(kernel) == signature(reference)
    assert ast.get_docstring(kernel) == f"Twin of `reference.{name}`.", "one description for both"


def test_every_kernel_file_has_its_twin():
    kernels, references = ({path.stem for path in sources(OPS / name)} for name in ("kernels", "reference"))
    assert kernels - NO_TWIN == references - {"__init__"} == set(TWINS)


MOST_PARAMETERS = {"kernel": 26, "device function": 13}


def parameters_of_jitted(package):
    """By name: what a function under `triton.jit` is, and how many parameters it has."""
    found = {}
    for path in sources(package):
        for name, function in functions(path).items():
            if any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list):
                assert not (function.args.vararg or function.args.kwarg), name
                arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
                found[name] = "kernel" if name.endswith("_kernel") else "device function", len(arguments)
    return found


def test_parameter_lists_are_short():
    found = parameters_of_jitted(OPS / "kernels")
    assert {kind for kind, _ in found.values()} == set(MOST_PARAMETERS)
    assert {name: count for name, (kind, count) in found.items() if count > MOST_PARAMETERS[kind]} == {}


FORBIDDEN = {
    "environment variables": r"os\.environ|os\.getenv|\bgetenv\(",
    # Of Triton, and PyTorch's operations that sum by them on a GPU.
    "float atomics": r"\batomic_|index_add|scatter_add|index_put|scatter_reduce",
    # A cache that trusts them goes stale: fused optimizers and `.data` do not count.
    "version counters": r"\._version\b",
    "the autotuner": r"\bautotune\b",
    # tests/ops/test_custom_operator.py holds the one to torch.library.opcheck.
    "custom operators": r"torch\.library|\bcustom_op\b",
}


# Autograd trusts version counters too, when a saved tensor was written over.
EXEMPT = {"version counters": {OPS / "output.py"}, "custom operators": {OPS / "custom_operator.py"}}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_the_engine_does_without(what):
    for path in {*sources()} - EXEMPT.get(what, set()):
        # Unparsed, so that comments may say why; docstrings are text too.
        code = "\n".join(ast.unparse(node) for node in parse(path).body if not isinstance(node, ast.Expr))
        assert not re.search(FORBIDDEN[what], code), f"{path} uses {what}"


def test_every_dot_says_its_precision():
    dots = 0
    for path in sources(OPS / "kernels"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                dots += 1
                assert "input_precision" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
    assert dots


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_globals_change(path):
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno}"
