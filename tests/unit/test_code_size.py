"""What `make sizes` counts, on a tree whose tokens are counted by hand."""

from collections import Counter

from code_size import counted, exceeded, tokens

CODE = '''"""A docstring."""

# a comment
X = "text"  # another


def f(a: int) -> int:
    """Say so."""
    """Not a docstring, but a string."""
    return a + 1
'''
# X = "text" | def f ( a : int ) -> int : | """...""" | return a + 1
COUNTED = 3 + 10 + 1 + 4


def test_comments_docstrings_and_layout_are_no_tokens() -> None:
    assert tokens(CODE) == COUNTED
    assert tokens(CODE.replace("(a: int)", "(\n    a: int\n)")) == COUNTED


def test_packages_are_counted_apart_and_together(tmp_path) -> None:
    package = tmp_path / "src/peft_vit/data"
    package.mkdir(parents=True)
    (package / "read.py").write_text(CODE)
    (package.parent / "top.py").write_text("x = 1\n")
    (package / "names.yaml").write_text("a: 1\nb: 2\n")
    sizes = counted(tmp_path)
    assert sizes["src data"] == {"tokens": COUNTED, "lines": 10, "modules": 1}
    assert sizes["src, all"] == {"tokens": COUNTED + 3, "lines": 11, "modules": 2}
    assert sizes["src, other files"] == {"lines": 2, "modules": 1}


def test_a_part_above_its_budget_is_named_with_what_it_has_and_may_have() -> None:
    found = {"src data": Counter(tokens=1200, lines=90), "tests": Counter(tokens=5, lines=41)}
    budgets = {"tokens": {"src data": 1150, "src lab": 1}, "lines": {"tests": 41}}
    assert exceeded(found, budgets) == [
        "src data: 1,200 tokens, 50 above the budget of 1,150 in benchmarks/budgets.toml"
    ]
    assert exceeded(found, {"tokens": {"src data": 1200}, "lines": {"tests": 40}}) == [
        "tests: 41 lines, 1 above the budget of 40 in benchmarks/budgets.toml"
    ]
