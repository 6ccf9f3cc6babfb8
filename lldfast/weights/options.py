"""The options of the rules, stated once: for `Rule`, the configuration of a run, weights files and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """Options of the rules from Delta (and G) to weights; everything here can be changed after a run.

    Attributes:
        tau: temperature, nats per token; a pure number (in units of std(Delta)) for the "spread" rules; inf gives the prior.
            Unused by "mirror", "adjusted-trust", "adjusted-fit".
        tau_end: temperature at the last step; tau moves there geometrically. Unset keeps tau.
        step_size: of "mirror".
        floor: least weight of any domain, in [0, 1/K].
        gram_scale: how G^-1 Delta is scaled by the "adjusted" rules, see `adjusted_direction`: "spread", "trace", "corr", "none".
        ridge: added to the diagonal of G, see `adjusted_direction`; "auto" is what the estimate of G chose, where it chose one.
        radius: of "adjusted-trust": KL of its weights from the prior, nats.
        fit_step: of "adjusted-fit": step in the unit of Delta / G, or "auto" to fit it with the weights.
    """

    tau: float = 1.0
    tau_end: float | None = None
    step_size: float = 4.0
    floor: float = 0.0
    gram_scale: Literal["spread", "trace", "corr", "none"] = "spread"
    ridge: float | Literal["auto"] = "auto"
    radius: float = 0.1
    fit_step: float | Literal["auto"] = "auto"
