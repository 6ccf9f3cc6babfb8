"""Labels, numbers and marks of the report: short, plain, and all different."""

from __future__ import annotations

from lldfast.report.style import domain_colors, method_marks, number, short_labels


def test_labels_numbers_marks() -> None:
    names = ["a" * 40, "a" * 39 + "b", "a" * 41, "short", "\x00bad"]
    labels = short_labels(names)
    assert len(set(labels.values())) == len(names) and max(map(len, labels.values())) <= 20
    assert labels["short"] == "short" and labels["\x00bad"] == "\ufffdbad"
    assert [number(x) for x in (None, 0.0, 1234.6, 0.01234, -2.5, 1.2e-7)] == [
        "\u2013", "0", "1235", "0.0123", "\u22122.50", "1.20e-07",
    ]  # fmt: skip
    marks = method_marks([f"m{i}" for i in range(20)], uniform=["m0", "m1"], oracle=["m2"])
    looks = {(mark.color, mark.marker, str(mark.dash)) for mark in marks.values()}
    assert len(looks) == 20, "two methods look the same"
    assert len(set(domain_colors([f"domain {i}" for i in range(20)]).values())) == 20
