"""Which texts may share a batch: where neighbours and padding change a text's values, it must not have them."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

from lldfast.models.hf_config import CONTEXT_FIELDS, UNLIMITED, config_int, rope_parameters


class Together(NamedTuple):
    """A rule for batches, such that every text has the values that it has in a run on this text alone.

    Attributes:
        alone: a text shares a batch with none.
        equal_above: texts of more tokens than this share a batch with texts of their own length only; 0: all do.
        bounds: texts on different sides of one of these lengths ("up to n", "more than n") share no batch.
        fresh_from: before a text of this many tokens or more, the model must forget the lengths that it has seen.
        room: most tokens that the model can be run on.
    """

    alone: bool = False
    equal_above: int = UNLIMITED
    bounds: tuple[int, ...] = ()
    fresh_from: int = UNLIMITED
    room: int = 0

    def inputs(self, tokens: int) -> int:
        """How many of a text's tokens the model is run on: all but the last one, which predicts nothing.

        Where a text's length counts, that is one of the whole text, so the last token goes along if there is room for it.
        """
        counts = self.alone or bool(self.bounds) or self.equal_above < UNLIMITED
        return tokens if counts and tokens <= self.room else tokens - 1

    def group(self, length: int) -> tuple[int, int]:
        """Texts of `length` tokens share a batch with those of the same group. Of longer texts it is the same, or larger."""
        return bisect_left(self.bounds, length), length if length > self.equal_above else 0

    def and_also(self, other: Together) -> Together:
        """The rule of a batch that two models see."""
        return Together(
            self.alone or other.alone,
            min(self.equal_above, other.equal_above),
            tuple(sorted({*self.bounds, *other.bounds})),
            min(self.fresh_from, other.fresh_from),
            min(self.room, other.room),
        )

    def __str__(self) -> str:
        if self.alone:
            return "one text in a batch"
        if self.equal_above < UNLIMITED:
            which = f" of more than {self.equal_above} tokens" if self.equal_above else ""
            return f"texts{which} in batches of equal length"
        if self.bounds:
            return f"texts of up to {self.bounds[0]} tokens and longer ones in batches of their own"
        return "any texts in a batch"


ANY = Together()
EQUAL = Together(equal_above=0)
ALONE = Together(alone=True)


def rule_of_config(config: Any) -> Together:
    """What a configuration says about lengths that a short probe does not reach.

    - Rope of type "longrope" has one set of frequencies up to a length and another above, chosen by the longest text of a batch.
    - "dynamic" rope makes its frequencies from the longest text of a batch, and transformers keeps them for shorter ones that
      come later, until one comes that needs no scaling.
    - A sparse attention that selects `index_topk` keys breaks ties between them differently among more keys.
    """
    rule = ANY
    context = config_int(config, CONTEXT_FIELDS, UNLIMITED)
    for rope in rope_parameters(config):
        kind = str(rope.get("rope_type", rope.get("type", "")))
        if kind == "longrope" and rope.get("short_factor") == rope.get("long_factor"):
            continue  # one set of frequencies for all lengths, as a converted GGUF file has
        if kind == "longrope":
            own = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            rule = rule.and_also(Together(bounds=(int(own or context),)))
        elif "dynamic" in kind:
            rule = rule.and_also(Together(equal_above=context, fresh_from=context))
    blocks = config_int(config, ("index_topk_blocks",), 0) * config_int(config, ("index_block_size",), 1)
    selected = config_int(config, ("index_topk",), 0) or blocks
    return rule.and_also(Together(equal_above=selected)) if selected else rule
