"""What decides the content of a prepared folder, stated once.

`lldfast prepare` takes its options from here, the section `data` of a run's configuration its keys, prepare.json its record,
and all of them what is said about an option. The signature of `prepare` is written out for its readers; a test compares it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lldfast.errors import InputError

# The order in prepare.json of what comes after the other options there.
LAST_IN_RECORD = ("seed", "split", "config", "max_documents", "on_error", "most_skipped", "drop_small_domains")


@dataclass
class CorpusOptions:
    """Texts, tokenizer and evaluation corpus: what a run's configuration can say too.

    Attributes:
        domain_field: label field of a document, dots for nesting (meta.source); unset: a folder per domain gives the labels, or
            the field meta.pile_set_name or domain.
        text_field: field with a document's text, dots for nesting.
        tokenizer: gpt2, bytes, bpe (trained on the corpus, see vocab_size), a tokenizer.json, a model folder, a hub id.
        vocab_size: vocabulary of the tokenizer bpe; of no other.
        domains: keep only these.
        eval_texts: evaluation texts in all, drawn in proportion to the domains' bytes; unset: 10,000, at most a tenth.
        eval_per_domain: evaluation texts of each domain; replaces eval_texts.
        estimate_share: share of them that Delta and G are estimated on; KL is measured on the others.
        max_documents: stop reading after so many documents (of the domains that are kept).
        seed: of the draw of evaluation texts, which does not depend on the order of the documents.
        on_error: at a record that cannot be used (a null text, invalid JSON or UTF-8, a missing field, ...) stop, or skip it:
            prepare.json counts and lists what was skipped. A damaged file always stops the run.
        most_skipped: refuse the inputs when more than this share of the records would be skipped.
        drop_small_domains: leave out domains that are too small for evaluation texts; otherwise they stop the run, all named.
    """

    domain_field: str | None = None
    text_field: str = "text"
    tokenizer: str = "gpt2"
    vocab_size: int | None = None
    domains: list[str] | None = None
    eval_texts: int | None = None
    eval_per_domain: int | None = None
    estimate_share: float = 0.5
    max_documents: int | None = None
    seed: int = 0
    on_error: Literal["stop", "skip"] = "stop"
    most_skipped: float = 0.1
    drop_small_domains: bool = False

    def corpus_options(self) -> dict[str, Any]:
        """These options as keyword arguments of `prepare`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(CorpusOptions)}


@dataclass
class PrepareOptions(CorpusOptions):
    """Everything that decides what `prepare` makes of its inputs.

    Attributes:
        split: split of a Hugging Face dataset.
        config: configuration of a Hugging Face dataset.
    """

    split: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        """Ways to say the same become one, since folders made with the same options are the same."""
        self.tokenizer = str(self.tokenizer)
        if self.domains is not None:
            self.domains = sorted({self.domains} if isinstance(self.domains, str) else set(self.domains))
        if self.eval_per_domain is not None:
            self.eval_texts = None

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            InputError: naming the option.
        """
        limits = {"eval_texts": 2, "eval_per_domain": 2, "max_documents": 1}  # two evaluation texts: one for each part
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.estimate_share < 1:
            raise InputError(f"estimate_share must lie between 0 and 1 (both parts need texts), got {self.estimate_share}")
        if self.on_error not in ("stop", "skip"):
            raise InputError(f"on_error must be 'stop' or 'skip', got {self.on_error!r}")
        if not 0 <= self.most_skipped < 1:
            raise InputError(f"most_skipped must be at least 0 and below 1, got {self.most_skipped}")
        if (self.tokenizer == "bpe") != (self.vocab_size is not None):
            raise InputError("vocab_size is needed by, and only by, the tokenizer 'bpe' that is trained here")
        if self.vocab_size is not None and self.vocab_size < 257:
            raise InputError(f"vocab_size must be at least 257 (256 bytes and the end-of-text token), got {self.vocab_size}")
        if self.domains is not None and not self.domains:
            raise InputError("domains is an empty list: name at least one, or leave it out for all")

    def record(self) -> dict[str, Any]:
        """The options as prepare.json holds them; the same options give the same text."""
        values = dataclasses.asdict(self)
        last = {name: values.pop(name) for name in LAST_IN_RECORD}
        return values | last
