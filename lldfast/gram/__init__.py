"""The Gram matrix G = J J^T of domain log-likelihood gradients, eqs. (4) and (6): exact, quantised or sketched, with its error.

Row k of J is the gradient of l_k, the mean log-likelihood per token of domain k. Every text belongs to one domain, so all of J
costs one forward and backward pass over the evaluation corpus (about 6 P N FLOPs against 2 P N for scoring); what grows with the
model are K rows of P numbers, which a sketch of k numbers each replaces (ops/sketch/fold.py).

`estimate` does it for a model and an evaluation corpus. `Collector` does it around any backward pass of yours, `Accumulator` from
gradients that you already have; `per_text` sketches the gradient of every single text; `fidelity` measures how well G predicts
what a step of your own optimiser does.
"""

from lldfast.gram.accumulator import Accumulator
from lldfast.gram.collector import Collector, Layout
from lldfast.gram.estimate import estimate
from lldfast.gram.fidelity import Fidelity, fidelity
from lldfast.gram.per_text import PerTextSketches, per_text
from lldfast.gram.result import GramEstimate

__all__ = [
    "Accumulator",
    "Collector",
    "Fidelity",
    "GramEstimate",
    "Layout",
    "PerTextSketches",
    "estimate",
    "fidelity",
    "per_text",
]
