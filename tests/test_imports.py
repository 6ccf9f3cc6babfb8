"""An import goes down only: the floors of the architecture, read from the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

# 0 kernels, errors, files; 1 what runs here, ops; 2 data, models, measures; 3 configuration, control; 4 programs; 5 commands
FLOORS = {
    "lldfast_kernels": 0,
    "lldfast.errors": 0,
    "lldfast.files": 0,
    "lldfast.terminal": 0,
    "lldfast.backends": 1,
    "lldfast.ops": 1,
    "lldfast.data": 2,
    "lldfast.models": 2,
    "lldfast.measure.loglik": 2,
    "lldfast.measure.divergence": 2,
    "lldfast.gram": 2,
    "lldfast.weights.equations": 2,
    "lldfast.weights.constrained": 2,
    "lldfast.weights.rules": 2,
    "lldfast.weights.file": 2,
    "lldfast.run.config": 3,
    "lldfast.controller": 3,
    "lldfast.schedule": 3,
    "lldfast.run.methods": 3,
    "lldfast.distill.objective": 3,
    "lldfast.run.optimizer": 3,
    "lldfast.run.checkpoint": 3,
    "lldfast.run.log": 3,
    "lldfast.train": 4,
    "lldfast.run.experiment": 4,
    "lldfast.report.summary": 4,
    "lldfast.distill.teach": 4,
    "lldfast.distill.generate": 4,
    "lldfast.measure.modelmap": 4,
    "lldfast.report.page": 4,
    "lldfast.report.figures": 4,
    "lldfast.report.html": 4,
    "lldfast.report.reading": 4,
    "lldfast.report.sections": 4,
    "lldfast.report.style": 4,
    "lldfast.export": 4,
    "lldfast.adapters": 4,
    "lldfast": 5,
    "lldfast.cli": 5,
    "lldfast.__main__": 5,
}
NUMPY_ONLY = ("lldfast.weights.equations", "lldfast.weights.constrained", "lldfast.measure.divergence")


def floor(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] == "lldfast" and len(parts) > 1:
        return FLOORS.get(".".join(parts[:2]))
    return FLOORS.get(parts[0])


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


def test_imports_go_down(repository):
    upward = []
    for module, path in files(repository):
        if module == "lldfast":  # the lazy names: held by test_importing_lldfast_is_light
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for node in ast.walk(tree):
            for name in imported(node, module, path):
                if name.split(".")[0] in ("lldfast", "lldfast_kernels") and (floor(name) or 0) > (floor(module) or 0):
                    upward.append(f"{path}:{node.lineno}: {module} imports {name}")
    assert not upward, "\n".join(upward)


def test_kernels_never_import_lldfast(repository):
    for module, path in files(repository):
        if module.split(".")[0] == "lldfast_kernels":
            names = [name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node, module, path)]
            assert not [name for name in names if name.split(".")[0] == "lldfast"], path


def test_weights_and_divergence_need_numpy_only(repository):
    for module, path in files(repository):
        if module not in NUMPY_ONLY:
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


def test_importing_lldfast_is_light():
    heavy = {"torch", "transformers", "datasets", "pyarrow", "matplotlib", "tiktoken", "tokenizers"}
    assert not heavy & modules_after("import lldfast")


@pytest.mark.parametrize("module", [*NUMPY_ONLY, "lldfast.backends", "lldfast.data.shards"])
def test_importing_without_torch(module):
    assert "torch" not in modules_after(f"import {module}")
