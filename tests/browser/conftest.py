"""Pages that are opened from disk, of which nothing may go wrong, and nothing out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chromium import context_of, running_chromium

COPY = "https://cdn.jsdelivr.net/"


@dataclass
class Seen:
    """What happened on a page that should not have."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_chromium() as running:
        yield running


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def open_page(browser: Any, seen: Seen) -> Iterator[Callable[..., Any]]:
    """Open a file in a fresh context, where a public copy may hand out files; afterwards nothing has gone wrong."""
    contexts, allowed = [], {"file:", "data:", "blob:"}

    def dismiss(dialog: Any) -> None:
        seen.dialogs.append(dialog.message)
        dialog.dismiss()

    def open_file(file: Path, copy: dict[str, bytes] | None = None, *, may_fail: bool = False, **options: Any) -> Any:
        context = context_of(browser, **options)
        contexts.append(context)
        page = context.new_page()
        if not may_fail:
            page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("dialog", dismiss)

        def answer(route: Any) -> None:
            content = copy and copy.get(route.request.url.rpartition("/")[2])
            route.fulfill(body=content, headers={"Access-Control-Allow-Origin": "*"}) if content else route.abort()

        if copy is not None:
            allowed.add(f"{COPY}npm/onnxruntime-web@")
            page.route(f"{COPY}**", answer)
        page.goto(file.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert seen.errors == []
    assert seen.dialogs == []
    assert [url for url in seen.requests if not url.startswith(tuple(allowed))] == []
