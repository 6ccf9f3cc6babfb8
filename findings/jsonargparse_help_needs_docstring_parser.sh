#!/usr/bin/env bash
# jsonargparse 4.53.0, which trainers build their command lines with, makes options of a dataclass's fields. What its docstring says of the
# fields becomes their help only where the package docstring-parser is installed; where it is not, the help texts are
# absent, and neither an error nor a warning says why. Plain `pip install jsonargparse` does not install it.
#
# Seen: without it `--help` shows `--steps STEPS  (type: int, default: 10)`; with docstring-parser 0.17.0
#       `--steps STEPS  Optimiser steps of the run. (type: int, default: 10)`.
# What to do: depend on jsonargparse[signatures], or set `action.help` yourself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jsonargparse==4.53.0 PyYAML==6.0.3 2>/dev/null

cat >"$work/program.py" <<'PYTHON'
import warnings
from dataclasses import dataclass

from jsonargparse import ArgumentParser

warnings.simplefilter("error")


@dataclass
class Settings:
    """Settings of a run.

    Attributes:
        steps: Optimiser steps of the run.
    """

    steps: int = 10


parser = ArgumentParser()
parser.add_class_arguments(Settings)
print(parser.format_help())
PYTHON

said() { "$work/venv/bin/python" "$work/program.py" 2>&1 | tr -s ' \n' ' '; }
without=$(said)
"$work/venv/bin/pip" install --quiet docstring-parser==0.17.0 2>/dev/null
with=$(said)
echo "without docstring-parser: ${without#*--steps}"
echo "with it:                  ${with#*--steps}"
changed() { echo "CHANGED: $1"; exit 1; }
[[ $without != *"Optimiser steps"* ]] || changed "the help is there without docstring-parser"
[[ $without == *"(type: int, default: 10)"* ]] || changed "$without"
[[ $with == *"Optimiser steps of the run. (type: int, default: 10)"* ]] || changed "$with"
echo "as described"
