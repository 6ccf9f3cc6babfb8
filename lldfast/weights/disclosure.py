"""What is to be said in public with a mixture that a target model shaped, and with a model that one taught."""

from __future__ import annotations

from typing import Any


def disclosure(rule: str | None, target: dict[str, Any] | None) -> str:
    """The statement that the paper's ethics section asks practitioners to publish with a mixture."""
    if rule is None or target is None:
        return "These domain weights were not estimated from a target model."
    licence = target.get("licence") or "not stated: check the target's terms of use before using these weights"
    return (
        f"These domain weights were estimated with reference to the target model {target.get('name', 'unnamed')!r} "
        f"(licence: {licence}), by log-likelihood differences ({rule} rule). Training with them is target-dependent even though "
        "the target is not used again; publish this statement with any model trained on them."
    )


def distillation_disclosure(teacher: dict[str, Any]) -> str:
    """What is to be published with a model that was distilled, behind `disclosure`."""
    licence = teacher.get("licence") or "not stated: check its terms of use before using the model"
    name = teacher.get("name", "unnamed")
    return f" The model was trained on the output distribution of the teacher {name!r} (licence: {licence})."
