"""`lldfast weights`: domain weights from a run's stored Delta_t, by any rule."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lldfast.errors import InputError
from lldfast.files import read_json
from lldfast.terminal import aligned

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("weights", help="recompute domain weights offline from a run's stored Delta_t")
    parser.add_argument("run", metavar="RUN", help="a run folder, a method's folder, or a weights.json")
    parser.add_argument("--method", help="which pass 1 of a run folder, when it has several")
    parser.add_argument(
        "--rule", help="another rule on the same trajectory: iterative, spread, mirror, adjusted, adjusted-spread, ..."
    )
    parser.add_argument("--tau", type=float)
    parser.add_argument("--step-size", type=float, help="of mirror")
    parser.add_argument("--radius", type=float, help="of adjusted-trust, nats")
    parser.add_argument("--fit-step", type=float, help="of adjusted-fit")
    parser.add_argument("--floor", type=float)
    parser.add_argument(
        "--aggregate", choices=["geometric", "arithmetic", "none"], default="geometric", help="none: the last estimate"
    )
    parser.add_argument("--step-weights", choices=["equal", "elapsed"])
    parser.add_argument("--stages", type=int, choices=[1, 2], default=1)
    parser.add_argument("--steps", type=int, nargs="+", help="use these estimates only")
    parser.add_argument("--out", help="weights file to write")
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    import dataclasses

    from lldfast.files import write_json
    from lldfast.weights.equations import effective_domains
    from lldfast.weights.file import read_weights_file, recompute, rule_of

    path = find_trajectory(Path(options.run), options.method)
    changes = {"name": options.rule, "tau": options.tau, "step_size": options.step_size, "floor": options.floor}
    changes |= {"radius": options.radius, "fit_step": options.fit_step}
    changes = {name: value for name, value in changes.items() if value is not None}
    rule = dataclasses.replace(rule_of(read_weights_file(path)), **changes)
    result = recompute(
        path,
        rule=rule,
        aggregate=options.aggregate,
        step_weights=options.step_weights,
        steps=options.steps,
        stages=options.stages,
    )
    print(f"{path}: rule {rule.name}, tau {rule.tau:g}, {result['aggregate']}, {result['step_weights']} step weights")
    for stage in result["stages"] or [{"weights": result["weights"]}]:
        if "from_step" in stage:
            print(f"from step {stage['from_step']}:")
        rows = []
        for name, weight in sorted(stage["weights"].items(), key=lambda item: -item[1]):
            error = "" if not result["weights_se"] else f" +- {result['weights_se'][name]:.4f}"
            rows.append((name, f"{weight:.4f}{error}"))
        print("\n".join(f"  {line}" for line in aligned(rows, left={0, 1}, least=(24,))))
        print(f"  effective domains {effective_domains(stage['weights']):.2f}")
    if options.out is not None:
        write_json(options.out, result)
        print(f"wrote {options.out}")


def find_trajectory(run: Path, method: str | None) -> Path:
    """The weights.json with stored Delta_t that RUN means.

    Raises:
        InputError: there is none, or several and no --method.
    """
    if not run.exists() or run == Path():
        raise InputError(f"{run}: no such run folder or weights file")
    if run.is_file():
        return run
    if (run / "weights.json").exists():
        return run / "weights.json"
    if method:
        path = run / "methods" / method / "weights.json"
        if not path.exists():
            raise InputError(f"{run} has no finished method {method!r}")
        return path
    found = [path for path in sorted(run.glob("methods/*/weights.json")) if read_json(path)["trajectory"]]
    if not found:
        raise InputError(f"{run} has no finished method with stored Delta_t (0 methods)")
    if len(found) != 1:
        names = ", ".join(path.parent.name for path in found)
        raise InputError(f"{run} has {len(found)} methods with stored Delta_t ({names}): choose one by --method")
    return found[0]
