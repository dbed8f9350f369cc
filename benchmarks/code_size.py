"""Count the code: tokens, lines and modules by wing, of the product and of what stands beside it.

Tokens are those of `tokenize` without comments, docstrings, line ends and indentation, so that neither formatting nor
documentation counts. What the product needs at run time counts wherever it lies: its YAML and templates as lines.

    python benchmarks/code_size.py [ROOT]

A wing, or the tests' lines, above its budget in benchmarks/budgets.toml is an error: delete something, or raise the
budget in the commit that needs it.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

_LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BUDGETS = "benchmarks/budgets.toml"
_PARTS = ("src/peft_vit", "tests", "benchmarks", "examples", "docs", "experiments")  # only the first by package


def tokens(code: str) -> int:
    """Return how many tokens of a module say something to Python."""
    docstrings = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstrings.add((node.body[0].lineno, node.body[0].col_offset))
    return sum(
        token.type not in _LAYOUT and not (token.type == tokenize.STRING and token.start in docstrings)
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
    )


def counted(root: Path) -> dict[str, Counter[str]]:
    """Return tokens, lines and modules by package or part, and lines of other files that the product is built with."""
    found: dict[str, Counter[str]] = {}
    for part in _PARTS:
        for file in sorted((root / part).rglob("*.py")):
            inner = file.relative_to(root / part).parts
            package = f"src {inner[0] if len(inner) > 1 else '(files)'}" if part == _PARTS[0] else part
            code = file.read_text()
            numbers = Counter(tokens=tokens(code), lines=code.count("\n"), modules=1)
            for name in (package, "src, all") if part == _PARTS[0] else (package,):
                found.setdefault(name, Counter()).update(numbers)
    for file in sorted((root / _PARTS[0]).rglob("*")):
        if file.suffix in {".yaml", ".css", ".js", ".html", ".j2"}:
            found.setdefault("src, other files", Counter()).update(lines=file.read_text().count("\n"), modules=1)
    return found


def exceeded(found: dict[str, Counter[str]], budgets: dict[str, dict[str, int]]) -> list[str]:
    """Return a line for each part that has more than its budget, which is of its tokens or of its lines."""
    return [
        f"{name}: {found[name][unit]:,} {unit}, {found[name][unit] - most:,} above the budget of {most:,} in {BUDGETS}"
        for unit, parts in budgets.items()
        for name, most in parts.items()
        if name in found and found[name][unit] > most
    ]


def main() -> int:
    """Print the table; return 1 if a budget is exceeded."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    found, place = counted(root), root / BUDGETS
    budgets = tomllib.loads(place.read_text()) if place.is_file() else {}
    print(f"{'part':<20}{'tokens':>9}{'budget':>9}{'lines':>9}{'budget':>9}{'modules':>9}")
    for name, numbers in found.items():
        most = [f"{budgets.get(unit, {}).get(name, '–'):>9}" for unit in ("tokens", "lines")]
        print(f"{name:<20}{numbers['tokens'] or '–':>9}{most[0]}{numbers['lines']:>9}{most[1]}{numbers['modules']:>9}")
    above = exceeded(found, budgets)
    print("\n".join(above), file=sys.stderr, end="\n" * bool(above))
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
