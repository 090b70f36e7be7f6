"""The rooms of docs/architecture.md and who may import whom, held by walking the imports."""

from __future__ import annotations

import ast
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

import pytest
from support.modules import MODULES

import lowmem_bagel

OUTSIDE = ("lowmem_bagel.converters", "lowmem_bagel.benchmarks")
HEAVY = (
    "torch", "numpy", "numba", "triton", "PIL", "rich", "huggingface_hub", "tokenizers", "safetensors", "accelerate",
    "bitsandbytes", "optimum", "dfloat11", "gradio", "transformers", "filelock", "httpcore2", "matplotlib",
)  # fmt: skip
"""Third-party packages that starting the command line must not wait for."""


class Imports(NamedTuple):
    """Of one module, each file read and parsed once. anywhere: also inside functions and for the type checker."""

    anywhere: frozenset[str]
    at_start: frozenset[str]


@cache
def imports_of(name: str) -> Imports:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    return Imports(imports(name, ast.walk(tree)), imports(name, statements(tree)))


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those inside functions or TYPE_CHECKING blocks."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                waiting.extend(child.orelse)
                continue
            if isinstance(child, ast.stmt):
                yield child
            waiting.append(child)


def imports(name: str, nodes: Iterator[ast.AST]) -> frozenset[str]:
    """Absolute names of what the nodes import; `from a import b` gives a, and a.b where that is a module."""
    found: set[str] = set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            submodules = [f"{origin}.{a.name}" for a in node.names if f"{origin}.{a.name}" in MODULES]
            found.update(submodules)
            if len(submodules) < len(node.names):
                found.add(origin)
    return frozenset(found)


def ours(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "lowmem_bagel"}


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@cache
def reached(name: str) -> frozenset[str]:
    """Modules of ours, and the outermost names of others, that importing `name` brings in."""
    seen: set[str] = set()
    waiting = {name}
    while waiting:
        current = waiting.pop()
        seen.add(current)
        if current in MODULES:
            parents = {".".join(current.split(".")[:n]) for n in range(1, current.count(".") + 1)}
            waiting |= (imports_of(current).at_start | parents) - seen
        elif "." in current:
            waiting |= {current.split(".")[0]} - seen
    return frozenset(seen)


def test_the_walk_sees_imports() -> None:
    """The checks below would pass on nothing: that these imports are found shows that the walk works."""
    assert "lowmem_bagel.errors" in imports_of("lowmem_bagel.checkpoint.config").at_start
    assert "torch" in reached("lowmem_bagel.pipeline")
    assert "lowmem_bagel.formats.int8.codec" in imports_of("lowmem_bagel.converters.int8").anywhere
    assert "lowmem_bagel.formats.int8.codec" not in imports_of("lowmem_bagel.converters.int8").at_start
    assert len(MODULES) > 60


def test_errors_import_nothing() -> None:
    assert imports_of("lowmem_bagel.errors").anywhere == set()


def importing(names: Iterable[str], *packages: str) -> list[str]:
    """Where one of these modules imports something of these packages: "module -> module"."""
    return [f"{name} -> {found}" for name in names for found in imports_of(name).anywhere if inside(found, *packages)]


def test_package_never_imports_converters_or_benchmarks() -> None:
    package = [name for name in MODULES if not inside(name, *OUTSIDE)]
    assert len(package) > 60
    assert importing(package, *OUTSIDE) == []


def test_converters_never_import_loader_or_pipeline() -> None:
    converters = [name for name in MODULES if inside(name, "lowmem_bagel.converters")]
    forbidden = ("lowmem_bagel.runtime.loader", "lowmem_bagel.pipeline", "lowmem_bagel.benchmarks", "lowmem_bagel.cli")
    assert len(converters) > 10
    assert importing(converters, *forbidden) == []
    assert not [name for name in converters if {"lowmem_bagel.runtime.loader", "lowmem_bagel.pipeline"} & reached(name)]


def test_imports_are_absolute_or_relative_to_the_installed_name() -> None:
    """`import converters.x` would make a second copy of the module."""
    assert importing(MODULES, "converters", "benchmarks", "tests") == []


ALLOWED: Mapping[str, str] = {
    "errors": "",
    "extensions": "errors",
    "units": "errors",
    "values": "",
    "timeline": "",
    "files": "",
    "hub": "errors files checkpoint",
    "hardware": "errors files",
    "checkpoint": "errors files",
    "sampling/step_caches": "errors extensions",
    "sampling/schedule": "",
    "option": "errors values",
    "settings": "errors values option extensions checkpoint hardware sampling/step_caches",
    "ops/attention": "errors extensions",
    "ops": "errors hardware ops/attention",
    "kernels": "errors hardware ops ops/attention",
    "formats/spec": "errors extensions checkpoint",
    "formats": "errors extensions hardware checkpoint ops kernels formats/spec",
    "model": "errors checkpoint ops ops/attention",
    "sampling": "model ops ops/attention settings sampling/step_caches sampling/schedule",
    "planner/plan": "errors checkpoint settings",
    "planner": "errors extensions units values hardware checkpoint settings planner/plan "
    "formats/spec ops/attention sampling/step_caches sampling/schedule",
    "diagnostics": "errors hardware checkpoint ops ops/attention kernels formats formats/spec",
    "planner/estimate": "errors units hardware checkpoint settings formats/spec diagnostics planner/plan planner",
    "runtime": "errors timeline hardware checkpoint ops ops/attention kernels formats/spec formats model sampling "
    "sampling/step_caches planner/plan",
    "pictures": "errors files",
    "generation": "errors files checkpoint settings ops model sampling sampling/step_caches pictures runtime",
    "pipeline": "errors values timeline settings checkpoint planner planner/estimate pictures runtime generation",
    "recipes": "errors files settings pictures generation pipeline",
    "batch": "errors units files values settings hardware checkpoint planner planner/estimate pictures generation "
    "pipeline demo_checkpoint",
    "serve": "errors units values files settings checkpoint hub planner/plan planner/estimate planner pictures "
    "generation sampling runtime pipeline hardware demo_checkpoint",
    "integrations": "errors extensions option settings hardware checkpoint planner planner/estimate model sampling "
    "runtime generation pipeline demo_checkpoint",
    "demo_checkpoint": "",
    "cli": "*",
    "converters": "errors files checkpoint formats/spec formats",
    "benchmarks": "*",
}
"""Who may import whom, imports inside functions and for the type checker included: room -> rooms, its own aside.

`formats/spec` is each format's declaration, which the planner reads, as it does `ops/attention`, the backends,
`sampling/step_caches` and `sampling/schedule`; `planner/plan` the plan, which the runtime reads; `planner/estimate` the
planner's end that probes this machine.
"*": everything but what is beside the package."""

WITHOUT_TORCH = (
    "errors",
    "extensions",
    "units",
    "values",
    "timeline",
    "files",
    "option",
    "settings",
    "checkpoint",
    "hub",
    "hardware",
    "pictures",
    "formats/spec",
    "sampling/step_caches",
    "sampling/schedule",
    "ops/attention",
    "planner",
    "planner/estimate",
    "recipes",
    "batch",
)
"""Rooms whose import brings no heavy package in."""


SHARED_BY_SIBLINGS = (
    "spec", "base", "registry", "linears", "summary", "dense", "scaled_matmul", "blocks", "measure", "extras",
    "compiled", "rows",
)  # fmt: skip
"""What the folders of formats, and the files of step caches, have in common."""


ROOMS_INSIDE: Mapping[str, str] = {
    "planner/plan": "planner/plan",
    "planner/estimate": "planner/estimate",
    "sampling/step_caches": "sampling/step_caches",
    "sampling/schedule": "sampling/schedule",
    "ops/attention/select": "ops",
    "ops/attention/full": "ops",
    "ops/attention": "ops/attention",
}
"""Modules and folders that are a room of their own inside another; the first that fits counts."""


def room(name: str) -> str | None:
    """The room of a module; None for the package's face."""
    if name in ("lowmem_bagel", "lowmem_bagel.converters", "lowmem_bagel.benchmarks"):
        return None
    parts = name.split(".")[1:]
    if parts[0] == "formats" and parts[-1] in ("spec", "registry", "groups", "patterns"):
        return "formats/spec"
    path = "/".join(parts)
    return next((own for place, own in ROOMS_INSIDE.items() if f"{path}/".startswith(f"{place}/")), parts[0])


def edges() -> dict[tuple[str, str], list[str]]:
    """(importing room, imported room) -> the imports, "module -> module"."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in MODULES:
        for other in ours(imports_of(name).anywhere):
            pair = room(name), room(other)
            if pair[0] is not None and pair[1] is not None and pair[0] != pair[1]:
                found.setdefault((pair[0], pair[1]), []).append(f"{name} -> {other}")
    return found


def allowed(one: str, imported: str) -> bool:
    rooms = ALLOWED[one].split()
    if rooms == ["*"]:
        return imported not in ("converters", "benchmarks")
    return imported in rooms


def test_rooms_import_only_what_the_table_allows() -> None:
    wrong = {pair: imports for pair, imports in edges().items() if not allowed(*pair)}
    assert not wrong, "\n".join(f"{pair}: {imports}" for pair, imports in wrong.items())


def test_every_room_stands_in_the_table() -> None:
    assert {room(name) for name in MODULES} - {None, "formats/spec"} == set(ALLOWED) - {"formats/spec"}


def test_the_table_has_no_circle() -> None:
    order: list[str] = []
    while len(order) < len(ALLOWED):
        free = [r for r, seen in ALLOWED.items() if r not in order and {*seen.split()} - {"*"} <= set(order)]
        assert free, f"a circle among {set(ALLOWED) - set(order)}"
        order += free


def test_files_are_in_no_circle() -> None:
    graph = {name: ours(imports_of(name).anywhere) & set(MODULES) for name in MODULES if room(name) is not None}
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


@pytest.mark.parametrize("folder", ["formats", "sampling.step_caches", "ops.attention"])
def test_siblings_never_import_each_other(folder: str) -> None:
    base = f"lowmem_bagel.{folder}"
    for name in MODULES:
        own = name.removeprefix(base + ".").split(".")[0]
        if not inside(name, base) or own in SHARED_BY_SIBLINGS or name == base:
            continue
        for other in imports_of(name).anywhere:
            theirs = other.removeprefix(base + ".").split(".")[0]
            assert not inside(other, base) or theirs in (own, *SHARED_BY_SIBLINGS), f"{name} -> {other}"


def test_rooms_without_torch() -> None:
    light = [name for name in MODULES if room(name) in WITHOUT_TORCH]
    assert {room(name) for name in light} == set(WITHOUT_TORCH)
    assert not [name for name in light if {"torch", "numpy"} & reached(name)]


def test_cli_starts_without_heavy_imports() -> None:
    """Measured on the real interpreter, so that what a light package pulls in is seen too."""
    code = "import sys, lowmem_bagel.cli, lowmem_bagel.cli.app; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in loaded
    assert not [name for name in loaded if inside(name, *HEAVY)]


def test_importing_the_package_is_light() -> None:
    code = "import sys, lowmem_bagel; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lowmem_bagel.errors" in loaded
    assert not [name for name in loaded if inside(name, "typer", *HEAVY)]


def test_public_names_are_frozen() -> None:
    assert sorted(lowmem_bagel.__all__) == ["BagelPipeline", "Clip", "Result", "__version__", "errors"]
    for name in lowmem_bagel.__all__:
        assert getattr(lowmem_bagel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        lowmem_bagel.Pipeline  # noqa: B018


def test_every_error_is_of_one_tree() -> None:
    from lowmem_bagel import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(classes) > 5
    assert all(issubclass(c, errors.LowmemBagelError) for c in classes)


NEEDS_A_CARD_OR_AN_EXTRA: frozenset[str] = frozenset()
"""Modules that cannot be imported everywhere. There should be none: what is optional is imported where it is used."""


def test_every_module_imports() -> None:
    """One test: preparing and reporting half a thousand took longer than the imports."""
    wrong = {}
    for name in sorted(set(MODULES) - NEEDS_A_CARD_OR_AN_EXTRA):
        try:
            assert importlib.import_module(name).__name__ == name
        except Exception as error:
            wrong[name] = repr(error)
    assert not wrong


def test_files_stay_small() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 450} == {}
