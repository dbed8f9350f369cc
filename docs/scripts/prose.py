"""Words that readers are spared, in the documents and in the program, and how long README and the pages may be.

    .venv/bin/python docs/scripts/prose.py

It reads README, docs/, tests/golden/ (what the program prints), and in src/ every text of two words and more: help,
messages, log lines, report texts and templates, and the docstrings of what is public. Code is left out. Each line that
it prints names a file, a line, the words, and what to write instead; then the exit code is 1. Proselint reads README
and the pages, too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from proselint.checks import __register__ as CHECKS
from proselint.config import DEFAULT
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "peft_vit"
PYTHON = ROOT / "docs" / "reference" / "python.md"  # which docstrings pages show
REGISTERED = SOURCE / "lab" / "analysis" / "findings.py"  # sentences that studies have tested stay
WORDS = {  # a pattern, and what to write instead
    r"ledger|mend(?:s|ed|ing)?|luckiest|bears?": "plain words",
    r"anew": "again",
    r"sealed|hold-?out\b(?!:)": "test set",
    r"in the mean": "on average",
    r"(?:go|goes|gone|going|went) on": "continue",
    r"(?:is|are|be) told(?: of)?|told|tells(?! you)": "say, report, list",
    r"takes? the place of|in place of": "replaces, instead of",
    r"stops? to gain|gains nothing": "stops improving",
    r"is yours to \w+": "say what it is",
    r"has to do\b(?= *[.;])": "say what is done",
    r"that does not say that": "say what may be",
    r"would buy|minutes can buy|bytes buy": "would bring, pay for",
    r"taken for": "predicted as",
    r"of no use|can(?:'t)? be had": "can't be used, can't be loaded",
    r"(?<!there )(?:is|are) no (?!longer|more|need|better|worse|larger|smaller|doubt)\w+": "is not a",
    r"nor (?:can|is|are|does|do) it": "turn it around: it can't",
    r"otherwise than|name \w+ otherwise": "differently, with another",
    r"whoever": "you",
    r"for want of": "for lack of",
    r"whereas|thereby|hereby|thereof|therein": "but, so",
    r"as they stand": "as they are",
    r"utili[sz]e|leverage|in order to|please note|it should be noted|obviously|simply": "leave it out, or use",
}
PRINTED_AND_PAGES = {  # in docstrings that no page shows these are terms of the code, or plain English
    r"sites?\b(?!:)": "target module, matrix",
    r"draws? of|(?:the|a|one|first|other|another|each|every|many|two|three|five|several) draws?": "choice, sample",
    r"draws (?:its|another|other|new|the)|drawn per": "choose",
    r"stands?\b(?! (?:for|in for)\b)|stood": "is, are",
    r"what bears": "name the thing",
    r"likewise": "the same",
}
NOT_OURS = ("typography", "lexical_illusions", "misc.phrasal_adjectives", "dates_times")  # symbols, headings, names
README_ONLY = {r"not decided": "say what is known", r"hypothes[ei]s": "one link is enough"}
README_LINES, README_WORDS, PAGES_WORDS = 110, 700, 32_000  # pages without reference/
_Described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
CODE = re.compile(r"^```.*?^```$|^ {4}.*?$|`[^`\n]*`|<!-- .*? -->|\]\([^)]*\)", re.MULTILINE | re.DOTALL)
DATA = re.compile(r"^CSV: .*$", re.MULTILINE)  # names of columns in a file, which stay
_REGISTERED = [
    *re.findall(r'"([^"\n]{20,})"', REGISTERED.read_text(encoding="utf-8")),
    "copies, sealed",  # keys of images.json
]
QUOTED = re.compile(r"`[^`]*`")  # in a text of the program
MARKUP = re.compile(r"\{[%{#].*?[%}#]\}|<(style|script)\b.*?</\1>|<[^>]*>", re.DOTALL)


def prose_of(text: str, code: re.Pattern[str]) -> str:
    """Return a text without what a pattern finds; its lines keep their numbers."""
    for sentence in _REGISTERED:
        text = text.replace(sentence, " " * len(sentence))
    return code.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text).lower()


def faults(text: str, words: dict[str, str], code: re.Pattern[str] = CODE) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the words and the advice for each pattern that a text holds."""
    prose = prose_of(text, code)
    for pattern, advice in words.items():
        for found in re.finditer(rf"\b(?:{pattern})\b", prose):
            yield prose.count("\n", 0, found.start()) + 1, found[0], advice


def style(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the advice of each check of proselint that a page does not pass."""
    checks = dict.fromkeys(NOT_OURS, False)  # the first that fits a check's name decides
    checks |= {name: on for name, on in DEFAULT["checks"].items() if name not in checks}
    page = LintFile("page", CODE.sub(lambda found: re.sub(r"[^\n]", "#", found[0]), text))
    for found in page.lint({"max_errors": 1000, "checks": checks}):
        yield found.pos[0], " ".join(found.check_result.message.split())


def texts(file: Path) -> Iterator[tuple[int, str, str | None]]:
    """Yield the line and the words of each text in a module, and of a docstring the name of what it describes.

    Docstrings of private names are left out. What is filled in is a blank, and one word is a key, not a text.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docs = {id(node.body[0].value): name for name, node in _described(tree, "") if ast.get_docstring(node)}  # type: ignore[attr-defined]
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            said = "".join(str(part.value) if isinstance(part, ast.Constant) else " {} " for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            said = node.value
        else:
            continue
        name = docs.get(id(node))
        private = re.search(r"(^|\.)_(?!_)", name or "")
        if not private and len(re.findall(r"[a-z]+", said)) > 1 and " " in said.strip():
            yield node.lineno, said, name


def _described(node: _Described, name: str) -> Iterator[tuple[str, _Described]]:
    yield name, node
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(inner, f"{name}.{inner.name}".removeprefix("."))


def lines() -> Iterator[str]:
    """Yield what is wrong with the documents and with what the program says."""
    readme, pages = ROOT / "README.md", sorted((ROOT / "docs").rglob("*.md"))
    everywhere = WORDS | PRINTED_AND_PAGES
    shown = set(re.findall(r"^::: \S*\b(\w+)$", PYTHON.read_text(encoding="utf-8"), re.MULTILINE))
    for file in (readme, *pages, *sorted((ROOT / "tests" / "golden").rglob("*.txt"))):
        words = everywhere | (README_ONLY if file == readme else {})
        text, is_page = file.read_text(encoding="utf-8"), file.suffix == ".md"
        for line, found, advice in faults(text, words, CODE if is_page else DATA):
            yield f"{file.relative_to(ROOT)}:{line}: {found!r}: {advice}"
        for line, advice in style(text) if is_page else ():
            yield f"{file.relative_to(ROOT)}:{line}: {advice}"
    for file in sorted(SOURCE.rglob("*.py")):
        for start, said, name in texts(file):
            is_shown = name is None or not shown.isdisjoint(name.split("."))
            for line, found, advice in faults(said, everywhere if is_shown else WORDS, QUOTED):
                yield f"{file.relative_to(ROOT)}:{start + line - 1}: {found!r}: {advice}"
    for file in sorted(SOURCE.rglob("*.j2")):
        for line, found, advice in faults(file.read_text(encoding="utf-8"), everywhere, MARKUP):
            yield f"{file.relative_to(ROOT)}:{line}: {found!r}: {advice}"
    text = readme.read_text(encoding="utf-8")
    if len(text.splitlines()) > README_LINES or len(text.split()) > README_WORDS:
        yield f"README.md: more than {README_LINES} lines or {README_WORDS} words"
    own = [page for page in pages if page.parent.name != "reference"]
    if (long := sum(len(page.read_text(encoding="utf-8").split()) for page in own)) > PAGES_WORDS:
        yield f"docs: {long:,} words beside the reference, more than {PAGES_WORDS:,}"


CheckRegistry().register_many(CHECKS)

if __name__ == "__main__":
    wrong = list(lines())
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))
