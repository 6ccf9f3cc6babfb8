"""A record of an input: bytes or a row -> text and label, and what may be wrong with one."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from lldfast.errors import listed

BOM = b"\xef\xbb\xbf"
_KINDS: dict[Any, str] = {
    type(None): "null",
    (int, float): "a number",
    str: "a string",
    (list, tuple): "a list",
    Mapping: "an object",
}


class BadRecord(Exception):
    """One record that cannot be used.

    Attributes:
        reason: the kind of fault, which records are counted by.
        detail: what a message says of this record.
        at: where in the record: goes on after "FILE, line 3".
        line: of the file, where the record has several.
    """

    def __init__(self, reason: str, detail: str, at: str = "", line: int | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.at, self.line = reason, detail, at, line


def json_kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    if isinstance(value, bool):
        return "true or false"
    for kinds, word in _KINDS.items():
        if isinstance(value, kinds):
            return word
    return type(value).__name__  # of Parquet, which has dates and bytes too


def parse_line(raw: bytes) -> Mapping[str, Any]:
    """The record of a line of JSON lines. A byte order mark before it is dropped: files that were joined have them inside."""
    try:
        row = json.loads((raw[3:] if raw.startswith(BOM) else raw).decode())
    except UnicodeDecodeError as error:
        at = f", byte {error.start + 1}"
        raise BadRecord("invalid UTF-8", f"invalid UTF-8 ({error.reason})", at) from None
    except json.JSONDecodeError as error:
        raise BadRecord("invalid JSON", f"not valid JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise BadRecord("JSON nested too deeply", "JSON nested too deeply") from None
    except ValueError:  # Python's limit for converting digits, which json passes on without a place
        raise BadRecord("integer too long", "an integer of more digits than Python reads") from None
    if not isinstance(row, dict):
        raise BadRecord("not a JSON object", f"expected a JSON object, got {json_kind(row)}")
    return row


def has_field(row: Mapping[str, Any], path: str) -> bool:
    try:
        field_of(row, path, "field")
    except BadRecord:
        return False
    return True


def field_of(row: Mapping[str, Any], path: str, what: str) -> Any:
    """The value at a dotted path; a key that holds the dots itself comes first."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            names = field_names(row)
            hint = did_you_mean(path, names)
            raise BadRecord(f"no {what}", f"no {what} {path!r}; the fields are {listed(names, 30)}.{hint}")
        value = value[key]
    return value


def check_text(text: Any, text_field: str) -> None:
    if not isinstance(text, str):
        kind = json_kind(text)
        raise BadRecord(
            "text is null" if text is None else "text is not a string", f"field {text_field!r} must be text, got {kind}"
        )
    _check_unicode(text, "text")


def check_label(domain: Any, domain_field: str | None) -> None:
    if not isinstance(domain, str):
        kind = json_kind(domain)
        reason = "label is null" if domain is None else "label is not a string"
        raise BadRecord(reason, f"field {domain_field!r} must be a domain name, got {kind}")
    if not domain.strip():
        raise BadRecord("label is empty", "the domain name is empty")
    if not domain.isprintable() and any(unicodedata.category(c) == "Cc" for c in domain):  # it goes to terminals and tables
        raise BadRecord("label has a control character", f"the domain name {domain!r:.100} has a control character")
    _check_unicode(domain, "domain name")


def _check_unicode(value: str, what: str) -> None:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            at = f"{error.reason} at character {error.start + 1}"
            raise BadRecord("lone surrogate", f"the {what} is not valid Unicode ({at})") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def field_names(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in row.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            names += field_names(value, f"{prefix}{key}.")
    return names
