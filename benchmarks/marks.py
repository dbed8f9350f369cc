"""Documents whose tables are made: each stands between the two marks that bear its name."""

from __future__ import annotations

import re
from collections.abc import Mapping


def filled(text: str, tables: Mapping[str, str]) -> str:
    """Return a document with each table between its marks.

    Raises:
        ValueError: if a mark is opened and not closed.
    """
    for name, content in tables.items():
        block = f"<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->"
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        text, places = pattern.subn(lambda _, block=block: block, text)
        if places != text.count(f"<!-- {name} -->"):
            raise ValueError(f"the mark {name} is opened, but not closed")
    return text
