"""Command lines of the README and of docs/: what a line reads, a line above it has made."""

import re
import shlex

import pytest

READS = ("--data", "--data.path", "--target", "--distill.cache", "--lld.weights")
# What a reader is to have, or what is a place holder or a model's name.
GIVEN = re.compile(r"my\.jsonl(\.zst)?|[A-Z]+(/.*)?|[\w-]+/[\w.-]+|asset:.*|package:.*")


def lines(text: str) -> list[str]:
    """Command lines of lldfast in the code blocks, continued lines joined, comments left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in joined if line.lstrip().startswith("lldfast ")]


@pytest.mark.parametrize("name", ["README.md", "docs/DISTILL.md"])
def test_lines_run_in_order(repository, name):
    made: set[str] = set()
    found = lines((repository / name).read_text(encoding="utf-8"))
    assert len(found) >= 5
    for line in found:
        words = [word for part in shlex.split(line) for word in part.split("=", 1)]
        read = [words[i + 1] for i, word in enumerate(words[:-1]) if word in READS]
        read += [word for word in words[2:3] if words[1] in ("verify", "weights", "report", "gram")]
        for path in read:
            known = path in made or any(path.startswith(f"{folder}/") for folder in made)
            assert known or GIVEN.fullmatch(path), f"{name}: no line above makes {path!r}: {line}"
        made |= {words[i + 1] for i, word in enumerate(words[:-1]) if word == "--out"}


def test_a_folder_that_no_line_makes_is_noticed():
    text = "```bash\nlldfast prepare my.jsonl.zst --out data\nlldfast teach M --data smol-data --out cache   # top k\n```\n"
    assert lines(text) == ["lldfast prepare my.jsonl.zst --out data", "lldfast teach M --data smol-data --out cache"]
