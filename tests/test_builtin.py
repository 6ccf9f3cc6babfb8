import itertools
import re
import unicodedata
from pathlib import Path

import pytest

from lldfast.data.making import builtin
from lldfast.data.making.sources import Source
from lldfast.errors import MissingDependencyError

pytest.importorskip("django", reason="the builtin corpus needs the extra demo")


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text, domain in builtin.documents():
        found.setdefault(domain, []).append(text)
    return found


def test_enough_text_of_every_domain(texts):
    assert sorted(texts) == sorted(builtin.DOMAINS) and len(texts) >= 10
    for name, documents in texts.items():
        size = sum(len(t.encode()) for t in documents)
        assert size <= builtin.CAP
        assert size > (20_000 if name == "fortran" else 100_000), name
        assert all(t.strip() for t in documents)
    assert len(texts["fortran"]) >= 20 and sum(map(len, texts["fortran"])) < 100_000  # the small domain on purpose


def test_same_text_every_time(texts):
    builtin._domain.cache_clear()
    again = list(builtin.documents())
    assert again == [(t, name) for name in sorted(texts) for t in texts[name]]


def share(documents: list[str], script: str) -> float:
    letters = [c for c in "".join(documents) if c.isalpha()]
    return sum(script in unicodedata.name(c, "") for c in letters) / len(letters)


def test_languages_differ(texts):
    assert share(texts["cyrillic"], "CYRILLIC") > 0.7
    assert share(texts["romance"], "LATIN") > 0.99
    assert share(texts["east-asian"], "CJK") + share(texts["east-asian"], "HANGUL") + share(texts["east-asian"], "KANA") > 0.5
    assert re.search(r"\bcontraseña\b", "".join(texts["romance"])) and "msgstr" not in "".join(texts["romance"])


def test_domains_look_like_what_they_are(texts):
    marks = {
        "cpp": "#include <",
        "docstrings": "Parameters\n----------",
        "font-metrics": "StartCharMetrics",
        "fortran": "end subroutine",
        "html": "<div",
        "javascript": "function(",
        "licences": "WARRANTY",
        "mathematics": ">>> from sympy",
        "python": "import ",
        "reference": "The standard type hierarchy",
        "yaml": "- func: ",
    }
    for name, mark in marks.items():
        joined = "".join(texts[name])
        others = sum(mark in "".join(texts[other]) for other in texts if other != name)
        assert mark in joined, name
        assert others <= len(texts) // 2, (name, mark)


def test_domains_share_no_document(texts):
    for a, b in itertools.combinations(texts, 2):
        assert not set(texts[a]) & set(texts[b]), (a, b)


def test_reads_no_tests_of_the_standard_library_and_no_other_packages():
    names = [name for name, _ in builtin.python()]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name for name in names)


def test_source_streams_it_and_resumes(texts):
    source = Source("builtin", domains=["fortran", "yaml"])
    every = list(source.documents())
    assert [d.text for d in every] == texts["fortran"] + texts["yaml"]
    assert list(source.documents(every[3].place)) == every[4:]


def test_missing_package_names_the_extra(monkeypatch):
    find = builtin.importlib.util.find_spec
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None if name == "django" else find(name))
    with pytest.raises(MissingDependencyError, match=r"package django.*pip install 'lldfast\[demo\]'"):
        list(builtin.DOMAINS["romance"]())

    def absent(name: str) -> None:
        raise builtin.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(builtin.importlib.metadata, "distribution", absent)
    with pytest.raises(MissingDependencyError, match="package torch"):
        list(builtin.DOMAINS["licences"]())


def test_a_domain_never_vanishes(monkeypatch):
    monkeypatch.setitem(builtin.DOMAINS, "fortran", lambda: iter(()))
    builtin._domain.cache_clear()
    with pytest.raises(MissingDependencyError, match="'fortran': its files are not in the installed packages"):
        list(builtin.documents())
    builtin._domain.cache_clear()


def test_translated_sentences(tmp_path):
    (tmp_path / "django.po").write_text(
        'msgid ""\nmsgstr ""\n"Content-Type: text/plain\\n"\n\n#: a.py:1\nmsgid "A"\nmsgstr "Ein \\"Ä\\""\n\n'
        'msgid "many"\nmsgid_plural "more"\nmsgstr[0] "eins"\nmsgstr[1] ""\n"zwei\\n"\n"drei"\n\n'
        '#, fuzzy\nmsgid "none"\nmsgstr ""\n',
        encoding="utf-8",
    )
    assert builtin._translated(tmp_path / "django.po") == 'Ein "Ä"\neins\nzwei\ndrei'


def test_docstrings(tmp_path):
    long = "words " * 50
    (tmp_path / "m.py").write_text(
        f'"""Module. {long}"""\nx = """not a docstring {long}"""\n'
        f'def f(a: int) -> dict[str, int]:\n    r"""Function \\d. {long}"""\n'
        f'class C:  # note\n    """Class.\n\n        Indented. {long}\n    """\n    def short(self):\n        """Too short."""\n'
    )
    found = builtin._docstrings_of(tmp_path / "m.py")
    begins = ["Module. w", "Function \\d. w", "Class.\n\nIndented. w"]
    assert [found.index(begin) for begin in begins] == sorted(found.index(begin) for begin in begins)
    assert "not a docstring" not in found and "Too short" not in found


def test_every_domain_is_documented():
    page = (Path(__file__).parents[1] / "docs" / "BUILTIN.md").read_text()
    for name in builtin.DOMAINS:
        assert f"`{name}`" in page
    assert set(builtin.versions()) > {"python", "torch", "Django"}
