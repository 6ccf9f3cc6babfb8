"""`lldfast weights`: domain weights from a run's stored Delta_t, by any rule."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from lldfast.cli.options import add_fields, values_of
from lldfast.errors import InputError, listed, naming
from lldfast.terminal import aligned
from lldfast.weights.options import RuleOptions

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("weights", help="recompute domain weights offline from a run's stored Delta_t")
    parser.add_argument("run", metavar="RUN", help="a run folder, a method's folder, or a weights.json")
    parser.add_argument("--method", help="which pass 1 of a run folder, when it has several")
    parser.add_argument(
        "--rule", help="another rule on the same trajectory: iterative, spread, mirror, adjusted, adjusted-spread, ..."
    )
    add_fields(parser, RuleOptions, keep_unset=True)  # unset: as the run had it
    parser.add_argument(
        "--aggregate", choices=["geometric", "arithmetic", "none"], default="geometric", help="none: the last estimate"
    )
    parser.add_argument(
        "--step-weights",
        choices=["equal", "elapsed"],
        help="of the estimates: equal, eq. (8), or by the time each was in force (default: elapsed for mirror and two stages)",
    )
    parser.add_argument("--stages", type=int, choices=[1, 2], default=1, help="mixtures of the recipe: one, or one for each half")
    parser.add_argument("--steps", type=int, nargs="+", help="use these estimates only")
    parser.add_argument("--out", help="weights file to write")
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast.weights.file import Stage, WeightsFile
    from lldfast.weights.recompute import recompute
    from lldfast.weights.simplex import effective_domains

    path = find_trajectory(Path(options.run), options.method)
    changes = values_of(options, RuleOptions) | ({} if options.rule is None else {"name": options.rule})
    file = WeightsFile.load(path)
    with naming(path):
        made_by = file.made_by()
    rule = dataclasses.replace(made_by, **changes)
    result = recompute(
        path,
        rule=rule,
        aggregate=options.aggregate,
        step_weights=options.step_weights,
        steps=options.steps,
        stages=options.stages,
    )
    print(f"{path}: rule {rule.name}, tau {rule.tau:g}, {result.aggregate}, {result.step_weights} step weights")
    for stage in result.stages or [Stage(0, result.weights)]:
        if result.stages:
            print(f"from step {stage.from_step}:")
        rows = []
        for name, weight in sorted(stage.weights.items(), key=lambda item: -item[1]):
            error = "" if not result.weights_se else f" +- {result.weights_se[name]:.4f}"
            rows.append((name, f"{weight:.4f}{error}"))
        print("\n".join(f"  {line}" for line in aligned(rows, left={0, 1}, least=(24,))))
        print(f"  effective domains {effective_domains(stage.weights):.2f}")
    if options.out is not None:
        result.save(options.out)
        print(f"wrote {options.out}")


def find_trajectory(run: Path, method: str | None) -> Path:
    """The weights file with stored Delta_t that RUN means: itself, a method's folder, or a run folder.

    Raises:
        InputError: there is none, or several and no --method.
    """
    from lldfast.run.folder import MethodFolder, RunFolder
    from lldfast.weights.file import WeightsFile

    if not run.exists() or run == Path():
        raise InputError(f"{run}: no such run folder or weights file")
    if run.is_file():
        return run
    if MethodFolder(run).weights.exists():
        return MethodFolder(run).weights
    folder = RunFolder(run)
    if method:
        path = folder.method(method).weights
        if not path.exists():
            raise InputError(f"{run} has no finished method {method!r}")
        return path
    written = [each for each in folder.methods() if each.weights.exists()]
    found = [each for each in written if WeightsFile.load(each.weights).trajectory]
    if not found:
        raise InputError(f"{run} has no finished method with stored Delta_t")
    if len(found) != 1:
        names = listed(each.name for each in found)
        raise InputError(f"{run} has {len(found)} methods with stored Delta_t ({names}): choose one by --method")
    return found[0].weights
