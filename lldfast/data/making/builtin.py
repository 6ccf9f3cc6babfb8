"""`--source builtin`: real text of clearly different kinds that is on this machine already, inside installed packages.

Nothing is downloaded. The packages are Python itself, lldfast's own dependencies, and Django (the extra `demo`), which
brings JavaScript, HTML and message catalogues in some ninety languages; no other installed package is looked at. For
given versions of these the corpus is always the same: the files of a domain are taken in the order of a hash of their
names until `CAP` bytes. docs/BUILTIN.md lists sources and licences.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import xxhash

from lldfast.errors import InputError, MissingDependencyError

CAP = 2_000_000  # bytes of text per domain: enough to train the demo's model, and read in seconds
PACKAGES = ("torch", "numpy", "matplotlib", "Django")  # whose files are read; sympy, mpmath and torchgen come with torch
LICENSED = (
    *("torch", "numpy", "pyarrow", "tiktoken", "safetensors", "datasets", "zstandard", "xxhash", "jsonargparse", "PyYAML"),
    *("matplotlib", "Django", "pandas", "sympy", "mpmath", "networkx", "Jinja2", "MarkupSafe", "fsspec", "pillow", "fonttools"),
    *("contourpy", "cycler", "kiwisolver", "packaging", "pyparsing", "python-dateutil", "six", "filelock", "typing-extensions"),
    *("huggingface-hub", "dill", "multiprocess", "requests", "urllib3", "idna", "certifi", "charset-normalizer", "regex", "tqdm"),
)
LANGUAGES = {
    "romance": ("ast", "ca", "es", "es_AR", "es_CO", "es_MX", "es_VE", "fr", "gl", "it", "pt", "pt_BR", "ro"),
    "cyrillic": ("be", "bg", "kk", "ky", "mk", "mn", "os", "ru", "sr", "tg", "tt", "udm", "uk"),
    "east-asian": ("ja", "ko", "zh_Hans", "zh_Hant"),
}
TEST_FOLDERS = {"test", "tests", "testing", "__pycache__"}

Text = tuple[str, Callable[[], str]]  # a name that fixes the order, and how to read the text


def documents() -> Iterator[tuple[str, str]]:
    """(text, domain) of the whole corpus, domain by domain in sorted order.

    Raises:
        MissingDependencyError: a package, or the files of one, are not there; a domain never vanishes silently.
    """
    for domain in sorted(DOMAINS):
        yield from ((text, domain) for text in _domain(domain))


@functools.cache  # prepare reads the corpus twice; it is small
def _domain(domain: str) -> tuple[str, ...]:
    texts: list[str] = []
    size = 0
    for _, read in sorted(DOMAINS[domain](), key=lambda text: (xxhash.xxh3_64_intdigest(text[0].encode()), text[0])):
        text = read()
        size += len(text.encode())
        if size > CAP:
            break
        if text.strip():
            texts.append(text)
    if not texts:
        raise MissingDependencyError(
            f"builtin domain {domain!r}: its files are not in the installed packages (some distributions strip them);"
            f" pip install --force-reinstall --no-deps {' '.join(PACKAGES)}"
        )
    return tuple(texts)


def versions() -> dict[str, str]:
    """Versions that decide the corpus: Python and every package whose files are read."""
    names = sorted({*PACKAGES, *LICENSED}, key=str.lower)
    return {"python": sys.version.split()[0], **{name: _distribution(name).version for name in names}}


def python() -> Iterator[Text]:
    """The standard library's modules, without tests and data tables."""
    skip = {"site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "lib-dynload"}
    return _texts(Path(sysconfig.get_paths()["stdlib"]), (".py",), skip)


def cpp() -> Iterator[Text]:
    """PyTorch's C++ headers, without the thousands of generated ones."""
    for part in ("ATen", "c10", "torch/csrc"):
        yield from _texts(_package("torch") / "include" / part, (".h",), {"ops"})


def javascript() -> Iterator[Text]:
    for name in ("django", "matplotlib"):
        texts = _texts(_package(name), (".js",), {"i18n"}, largest=400_000)
        yield from (text for text in texts if not text[0].endswith(".min.js"))


def html() -> Iterator[Text]:
    """Templates and style sheets."""
    for name in ("django", "matplotlib"):
        yield from _texts(_package(name), (".html", ".css"))


def yaml() -> Iterator[Text]:
    """The operator schemas from which PyTorch is generated: a few very long documents."""
    return _texts(_package("torchgen"), (".yaml",), largest=CAP)


def fortran() -> Iterator[Text]:
    """The programs that f2py is tested with: on purpose a very small domain."""
    return _texts(_package("numpy") / "f2py" / "tests" / "src", (".f", ".f90", ".F90"))


def docstrings() -> Iterator[Text]:
    """Scientific documentation: the docstrings of each module of numpy, pandas and torch.nn, one document a module."""
    places = [_package("numpy"), _package("pandas"), *(_package("torch") / part for part in ("nn", "optim", "distributions"))]
    for place in places:
        yield from _docstrings(place)


def mathematics() -> Iterator[Text]:
    """The docstrings of sympy and mpmath: formulas, definitions, worked examples."""
    for name in ("sympy", "mpmath"):
        yield from _docstrings(_package(name))


def reference() -> Iterator[Text]:
    """The chapters of Python's language reference that `help()` prints."""
    from pydoc_data import topics

    for name, text in topics.topics.items():
        yield name, partial(str, text)


def licences() -> Iterator[Text]:
    """Licence files of our dependencies, without those that differ from another in the copyright line only."""
    seen = set()
    for name in LICENSED:
        for file in sorted(_distribution(name).files or [], key=str):
            if not re.search(r"\.dist-info/.*(licen[sc]e|copying|notice)", str(file), re.IGNORECASE):
                continue
            path = Path(str(file.locate()))
            text = path.read_bytes().decode("utf-8", "replace")
            core = " ".join(re.sub(r"(?im)^.*copyright.*$", "", text).split())
            if core not in seen:
                seen.add(core)
                yield f"{name}/{path.name}/{len(seen)}", partial(str, text)


def font_metrics() -> Iterator[Text]:
    """Adobe font metrics: long numeric tables."""
    return _texts(_package("matplotlib") / "mpl-data" / "fonts", (".afm",))


def translations(languages: tuple[str, ...]) -> Iterator[Text]:
    """The translated sentences of Django's message catalogues in some languages, one document a catalogue."""
    root = _package("django")
    for path in _walk(root, (".po",), TEST_FOLDERS):
        if path.parts[-3] in languages:
            yield path.relative_to(root).as_posix(), partial(_translated, path)


DOMAINS: dict[str, Callable[[], Iterator[Text]]] = {
    "cpp": cpp,
    "docstrings": docstrings,
    "font-metrics": font_metrics,
    "fortran": fortran,
    "html": html,
    "javascript": javascript,
    "licences": licences,
    "mathematics": mathematics,
    "python": python,
    "reference": reference,
    "yaml": yaml,
    **{family: partial(translations, languages) for family, languages in LANGUAGES.items()},
}


def _walk(root: Path, suffixes: tuple[str, ...], skip: Iterable[str]) -> Iterator[Path]:
    """Files under `root` in any order; folders named in `skip` are not entered."""
    for folder, children, files in os.walk(root):
        children[:] = [child for child in children if child not in skip]
        yield from (Path(folder, file) for file in files if file.endswith(suffixes))


def _texts(root: Path, suffixes: tuple[str, ...], skip: Iterable[str] = (), largest: int = 200_000) -> Iterator[Text]:
    """The files under `root` outside tests, except any so large that it alone would be the domain."""
    for path in _walk(root, suffixes, TEST_FOLDERS.union(skip)):
        if path.stat().st_size <= largest:
            yield f"{root.name}/{path.relative_to(root).as_posix()}", partial(_read, path)


def _docstrings(root: Path) -> Iterator[Text]:
    for path in _walk(root, (".py",), TEST_FOLDERS):
        yield f"{root.name}/{path.relative_to(root).as_posix()}", partial(_docstrings_of, path)


def _docstrings_of(path: Path) -> str:
    """Docstrings of some length, in the order of the file. A docstring is a string that begins a block.

    Searching for them is faster than parsing the module; only the literal found is parsed.
    """
    found, source = [], _read(path)
    for match in re.finditer(r'(?:\A|:[ \t]*(?:#[^\n]*)?\n)\s*([rRuU]?"""(?:[^"\\]|\\.|"(?!""))*""")', source):
        try:
            text = inspect.cleandoc(ast.literal_eval(match[1]))
        except (SyntaxError, ValueError):  # a template with escapes that Python does not know
            continue
        if len(text) >= 200:
            found.append(text)
    return "\n\n".join(found)


def _translated(path: Path) -> str:
    """Every distinct translation of a .po file, one a line; untranslated entries, plural repeats and the header fall out."""
    lines: dict[str, None] = {}
    for entry in _read(path).split("\n\n")[1:]:
        for match in re.finditer(r'^msgstr(?:\[\d+\])?((?:[ \n]"(?:[^"\\]|\\.)*")+)', entry, re.MULTILINE):
            pieces = re.findall(r'"((?:[^"\\]|\\.)*)"', match[1])
            line = "".join(pieces).replace("\\n", "\n").replace('\\"', '"').replace("\\t", "\t").replace("\\\\", "\\").strip()
            if line:
                lines[line] = None
    return "\n".join(lines)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: invalid UTF-8 at byte {error.start}") from None


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(name)
    return Path(spec.submodule_search_locations[0])


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise _missing(name) from None


def _missing(name: str) -> MissingDependencyError:
    return MissingDependencyError(f"the builtin corpus needs the package {name}: pip install 'lldfast[demo]' brings it")
