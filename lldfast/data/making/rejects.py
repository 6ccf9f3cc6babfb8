"""Records that are left out because something is wrong with them: counted by reason, listed, and refused when they are many."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lldfast.errors import InputError

MOST_LISTED = 100  # that prepare.json names; the counts are of all


class Rejects:
    """Of one reading of a source.

    Attributes:
        n_records: records met, good and bad.
        reasons: bad records by reason.
        listed: [file, "line 3", reason] of the first ones.
    """

    def __init__(self) -> None:
        self.n_records = 0
        self.reasons: Counter[str] = Counter()
        self.listed: list[list[str]] = []
        self._first = ""

    def add(self, name: str, place: str, reason: str, detail: str) -> None:
        self._first = self._first or f"{name}, {place}: {detail}"
        self.reasons[reason] += 1
        if len(self.listed) < MOST_LISTED:
            self.listed.append([name, place, reason])

    def check(self, most: float) -> None:
        """Refuse a source of which more than the share `most` was left out.

        Raises:
            InputError: with the counts and the first record.
        """
        count = self.reasons.total()
        if count > most * self.n_records:
            raise InputError(
                f"{count} of {self.n_records} records are bad, more than the share of {most:g} that may be (option most_skipped,"
                " --most-skipped):"
                f" {counted(self.reasons)}; the first is {self._first}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "records": self.n_records,
            "skipped": self.reasons.total(),
            "reasons": dict(sorted(self.reasons.items())),
            "listed": self.listed,
        }


def counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} ({n})" for reason, n in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
