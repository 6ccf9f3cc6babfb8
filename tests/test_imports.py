"""An import goes down only: the floors of the architecture, read from the source of every file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys

import pytest

# A room of the house, or a file at its root, and the floor that it is on.
FLOORS = {
    "lldfast_kernels": 0,
    "lldfast.errors": 1,
    "lldfast.files": 1,
    "lldfast.backends": 1,
    "lldfast.schedule": 1,
    "lldfast.terminal": 1,
    "lldfast.ops": 2,
    "lldfast.weights": 2,
    "lldfast.data": 3,
    "lldfast.models": 4,
    "lldfast.measure": 5,
    "lldfast.gram": 5,
    "lldfast.distill": 5,
    "lldfast.controller": 6,
    "lldfast.run": 7,
    "lldfast.loop": 8,
    "lldfast.report": 8,
    "lldfast.train": 9,
    "lldfast.cli": 10,
    "lldfast.__main__": 10,
    "lldfast": 10,  # the door: its names are loaded when they are used
}
NUMPY_ONLY = ("lldfast.weights.", "lldfast.measure.loglik", "lldfast.measure.divergence")


def room(module: str) -> str:
    """lldfast.data.making.prepare -> lldfast.data"""
    return ".".join(module.split(".")[: 2 if module.startswith("lldfast.") else 1])


def floor(module: str) -> int | None:
    return FLOORS.get(room(module))


def files(repository):
    for root, top in ((repository, "lldfast"), (repository / "kernels", "lldfast_kernels")):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(node: ast.AST, module: str, path) -> list[str]:
    """The modules that an import statement names; `from package import name` may name a module too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the floor; write the full name"
    if node.module == "lldfast":
        return [f"lldfast.{alias.name}" for alias in node.names if alias.name != "__version__"]
    return [node.module or ""]


def graph(repository) -> dict[str, set[str]]:
    """{module: the modules that it imports anywhere}: inside functions and under TYPE_CHECKING too."""
    modules = dict(files(repository))
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.ImportFrom):  # a name of a package may be a module, which is meant then
                names |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in modules else node.module for a in node.names}
            else:
                names |= set(imported(node, module, path))
        found[module] = {name for name in names if name in modules and name != module}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes that lie on a circle or lead only to one; none when there is none."""
    left = {node: set(targets) for node, targets in edges.items()}
    while True:
        ends = {node for node, targets in left.items() if not targets & left.keys()}
        if not ends:
            return sorted(left)
        left = {node: targets for node, targets in left.items() if node not in ends}


def top_level(tree: ast.Module) -> list[ast.AST]:
    """Statements that run at import: all outside functions and `if TYPE_CHECKING`."""
    found: list[ast.AST] = []
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        found.append(node)
        stack += list(ast.iter_child_nodes(node))
    return found


def test_every_file_has_a_floor(repository):
    modules = [module for module, _ in files(repository)]
    assert "lldfast.data.shards" in modules and "lldfast_kernels" in modules
    unknown = [module for module in modules if floor(module) is None]
    assert not unknown, f"give {unknown} a floor in {__file__}"


def test_the_root_holds_the_door_the_loop_the_controller_and_floor_one(repository):
    files = {path.stem for path in (repository / "lldfast").glob("*.py")}
    ground = {"errors", "files", "backends", "schedule", "terminal"}
    assert files == {"__init__", "__main__", "train", "loop", "controller"} | ground


def test_imports_go_down(repository):
    upward = []
    for module, names in graph(repository).items():
        if module == "lldfast":  # the lazy names: held by test_importing_lldfast_is_light
            continue
        upward += [f"{module} imports {name}" for name in names if (floor(name) or 0) > (floor(module) or 0)]
    assert not upward, "\n".join(upward)


def test_no_circles(repository):
    """Neither of files nor of rooms, what is imported inside functions and for type checkers included."""
    edges = graph(repository)
    del edges["lldfast"]
    assert not circle(edges)
    rooms: dict[str, set[str]] = {}
    for module, names in edges.items():
        rooms.setdefault(room(module), set()).update(room(name) for name in names if room(name) != room(module))
    assert not circle(rooms)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_kernels_never_import_lldfast(repository):
    for module, path in files(repository):
        if module.split(".")[0] == "lldfast_kernels":
            names = [name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node, module, path)]
            assert not [name for name in names if name.split(".")[0] == "lldfast"], path


def test_weights_and_divergence_need_numpy_only(repository):
    for module, path in files(repository):
        if not module.startswith(NUMPY_ONLY):
            continue
        tops = {
            name.split(".")[0]
            for node in top_level(ast.parse(path.read_text(encoding="utf-8")))
            for name in imported(node, module, path)
        }
        outside = tops - set(sys.stdlib_module_names) - {"numpy", "lldfast"}
        assert not outside, f"{path} imports {sorted(outside)} at module level"


def test_nobody_imports_the_extension_past_backends(repository):
    # Everyone else asks lldfast.backends, which knows whether it is there.
    for module, path in files(repository):
        names = [name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in imported(node, module, path)]
        assert not [name for name in names if name in ("lldfast._C", "lldfast._cuda")], path


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


def test_what_benchmarks_and_examples_import_is_there(repository):
    """No other test runs the benchmarks."""
    for path in sorted([*repository.glob("bench/*.py"), *repository.glob("examples/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("lldfast", "lldfast_kernels"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    found = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert found, f"{path}:{node.lineno}: {node.module} has no {alias.name}"


def test_importing_lldfast_is_light():
    heavy = {"torch", "transformers", "datasets", "pyarrow", "matplotlib", "tiktoken", "tokenizers"}
    assert not heavy & modules_after("import lldfast")


@pytest.mark.parametrize(
    "module",
    ["lldfast.weights.recompute", "lldfast.measure.divergence", "lldfast.backends", "lldfast.data.shards", "lldfast.cli"],
)
def test_importing_without_torch(module):
    assert "torch" not in modules_after(f"import {module}")


def test_former_modules_go_on_working():
    import lldfast

    for former, present in lldfast._FORMER_MODULES.items():
        sys.modules.pop(former, None)
        with pytest.warns(DeprecationWarning, match=present[0]):
            module = importlib.import_module(former)
        for home in map(importlib.import_module, present):
            name = next(name for name, value in vars(home).items() if getattr(value, "__module__", None) == home.__name__)
            assert getattr(module, name) is getattr(home, name)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            module.nothing  # noqa: B018
    for former, present in lldfast._FORMER_NAMES.items():
        with pytest.warns(DeprecationWarning, match=f"use lldfast.{present}"):
            assert getattr(lldfast, former) is getattr(lldfast, present)


def test_the_public_names_are_there():
    """A name here is a promise."""
    import lldfast as lld

    promised = """linear_logprob logprob linear_cross_entropy distill_loss distill_loss_from_logits score LoglikVector lld_weights
        adjusted_lld_weights aggregate_weights kl_matrix true_kl weight_kl jsd_matrix TokenShards DomainMixture LLDController
        backends"""
    for name in [*promised.split(), *lld.__all__]:
        assert getattr(lld, name) is not None
    assert callable(lld.gram.estimate) and callable(lld.gram.Accumulator) and callable(lld.weights.adjusted_direction)
    assert callable(lld.teach.teach) and callable(lld.generate.generate) and callable(lld.modelmap.model_map)


@pytest.mark.slow
def test_the_warning_points_at_the_line_that_imports(tmp_path):
    """Python shows a DeprecationWarning by default where it points at the program itself."""
    (tmp_path / "mine.py").write_text(
        "import lldfast.rules\nfrom lldfast.loglik import *\nfrom lldfast import Scorer\nprint(delta)\n"
    )
    said = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    for line, name in [(1, "lldfast.rules"), (2, "lldfast.loglik"), (3, "lldfast.Scorer")]:
        assert f"mine.py:{line}: DeprecationWarning: {name} is deprecated" in said
