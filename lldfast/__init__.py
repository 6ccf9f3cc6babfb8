"""Domain-mixture design by log-likelihood differences: `import lldfast as lld`.

Names are loaded when first used, so that importing lldfast does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# At once, not when first used: importing the submodule later would otherwise put the module in the function's place.
from lldfast.backends import backends
from lldfast.errors import deprecated, forward_modules

__version__ = "0.1.0"

_NAMES = {
    "linear_logprob": "lldfast.ops.linear_logprob",
    "linear_cross_entropy": "lldfast.ops.linear_logprob",
    "logprob": "lldfast.ops.logprob",
    "merge_vocab_shards": "lldfast.ops.logprob",
    "distill_loss": "lldfast.ops.distill.loss",
    "distill_loss_from_logits": "lldfast.ops.distill.loss",
    "distill_loss_topk": "lldfast.ops.distill.loss",
    "SegmentSums": "lldfast.ops.segments",
    "score": "lldfast.measure.score",
    "delta": "lldfast.measure.loglik",
    "LoglikVector": "lldfast.measure.loglik",
    "load_model": "lldfast.models.loading",
    "LanguageModel": "lldfast.models.language_model",
    "GPT": "lldfast.models.gpt",
    "GPTConfig": "lldfast.models.gpt",
    "EvalSet": "lldfast.data.evalset",
    "TokenShards": "lldfast.data.shards",
    "DomainMixture": "lldfast.data.mixture",
    "TeacherCache": "lldfast.distill.cache",
    "prepare": "lldfast.data.making.prepare",
    "LLDController": "lldfast.controller",
    "lld_weights": "lldfast.weights.equations",
    "adjusted_lld_weights": "lldfast.weights.equations",
    "trust_region_weights": "lldfast.weights.constrained",
    "fit_weights": "lldfast.weights.constrained",
    "aggregate_weights": "lldfast.weights.equations",
    "effective_domains": "lldfast.weights.simplex",
    "Rule": "lldfast.weights.rules",
    "WeightsFile": "lldfast.weights.file",
    "load_weights": "lldfast.weights.file",
    "save_weights": "lldfast.weights.file",
    "kl": "lldfast.measure.divergence",
    "kl_matrix": "lldfast.measure.divergence",
    "true_kl": "lldfast.measure.divergence",
    "nll_gap": "lldfast.measure.divergence",
    "weight_kl": "lldfast.measure.divergence",
    "jsd_matrix": "lldfast.measure.divergence",
    "LLDError": "lldfast.errors",
}
# modules that are an interface of their own: lld.gram.estimate(...), lld.weights.adjusted_direction(...)
_MODULES = {
    "gram": "lldfast.gram",
    "weights": "lldfast.weights",
    "schedule": "lldfast.schedule",
    "divergence": "lldfast.measure.divergence",
    "modelmap": "lldfast.measure.modelmap",
    "teach": "lldfast.distill.teach",
    "generate": "lldfast.distill.generate",
}
# former name -> present name; former module -> the modules that hold what it held
_FORMER_NAMES = {"Scorer": "LanguageModel", "load_scorer": "load_model"}
_FORMER_MODULES = {
    "lldfast.config": ["lldfast.run.config", "lldfast.run.parsing", "lldfast.run.distill", "lldfast.run.methods"],
    "lldfast.constrained": ["lldfast.weights.constrained"],
    "lldfast.data.prepare": ["lldfast.data.making.prepare"],
    "lldfast.data.teachercache": ["lldfast.distill.cache"],
    "lldfast.divergence": ["lldfast.measure.divergence"],
    "lldfast.generate": ["lldfast.distill.generate"],
    "lldfast.loglik": ["lldfast.measure.loglik", "lldfast.measure.score"],
    "lldfast.methods": ["lldfast.run.methods", "lldfast.run.distill"],
    "lldfast.modelmap": ["lldfast.measure.modelmap"],
    "lldfast.models.scorer": ["lldfast.models.language_model", "lldfast.models.loading", "lldfast.models.head"],
    "lldfast.rules": ["lldfast.weights.rules", "lldfast.weights.recipe"],
    "lldfast.teach": ["lldfast.distill.teach"],
    "lldfast.weightsfile": ["lldfast.weights.file", "lldfast.weights.recompute", "lldfast.weights.disclosure"],
}

__all__ = [*_NAMES, *_MODULES, "__version__", "backends"]


def __getattr__(name: str) -> Any:
    if name in _FORMER_NAMES:
        deprecated(f"lldfast.{name}", f"lldfast.{_FORMER_NAMES[name]}")
        name = _FORMER_NAMES[name]
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'lldfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


forward_modules(_FORMER_MODULES)


# ruff: noqa: F401  (for type checkers and editors; at run time __getattr__ loads these)
if TYPE_CHECKING:
    from lldfast import gram, schedule, weights
    from lldfast.controller import LLDController
    from lldfast.data.evalset import EvalSet
    from lldfast.data.making.prepare import prepare
    from lldfast.data.mixture import DomainMixture
    from lldfast.data.shards import TokenShards
    from lldfast.distill import generate, teach
    from lldfast.distill.cache import TeacherCache
    from lldfast.errors import LLDError
    from lldfast.measure import divergence, modelmap
    from lldfast.measure.divergence import jsd_matrix, kl, kl_matrix, nll_gap, true_kl, weight_kl
    from lldfast.measure.loglik import LoglikVector, delta
    from lldfast.measure.score import score
    from lldfast.models.gpt import GPT, GPTConfig
    from lldfast.models.language_model import LanguageModel
    from lldfast.models.loading import load_model
    from lldfast.ops.distill.loss import distill_loss, distill_loss_from_logits, distill_loss_topk
    from lldfast.ops.linear_logprob import linear_cross_entropy, linear_logprob
    from lldfast.ops.logprob import logprob, merge_vocab_shards
    from lldfast.ops.segments import SegmentSums
    from lldfast.weights.constrained import fit_weights, trust_region_weights
    from lldfast.weights.equations import adjusted_lld_weights, aggregate_weights, lld_weights
    from lldfast.weights.file import WeightsFile, load_weights, save_weights
    from lldfast.weights.rules import Rule
    from lldfast.weights.simplex import effective_domains
