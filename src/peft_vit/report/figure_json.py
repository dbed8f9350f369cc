"""What a figure's script needs, as JSON inside the page: points, rows of the CSV file, the walk through steps.

Texts repeat (names, steps), so each column holds its distinct texts once and an index a row. Every character
that could end the block or a string literal is written as an escape: no name can break out of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from peft_vit.report.document import Drawing, Player, Raw, StudyDocument
from peft_vit.report.style import THEME

_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}  # U+2028 and all else beyond ASCII: json escapes it


def script() -> Markup:
    """Return the page's only script."""
    source = files("peft_vit.report").joinpath("templates", "figures.js").read_text(encoding="utf-8")
    assert "</" not in source
    return Markup(source)


def script_hash() -> str:
    """Return the script's hash as a Content-Security-Policy names it: no other script runs on the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script()).encode()).digest()).decode()


def embedded(document: StudyDocument, drawing: Drawing) -> Markup:
    """Return the content of a figure's JSON block."""
    points = drawing.points
    content: dict[str, Any] = {
        "file": f"{document.slug}_{drawing.slug}.csv",
        "names": [series.name for series in drawing.series],
        "x": [_placed(point.x_pt) for point in points],
        "y": [_placed(point.y_pt) for point in points],
        "series": [point.series for point in points],
        "text": _coded(point.text for point in points),
        "columns": _columns(drawing.data),
    }
    if drawing.player is not None:
        content["player"] = _player(drawing.player)
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup("".join(_UNSAFE.get(character, character) for character in text))


def _placed(distance_pt: float) -> float:
    """Return where a value stands; one that is not finite is not drawn, and stands where no pointer comes near."""
    return distance_pt if math.isfinite(distance_pt) else -1e6


def _columns(rows: Iterable[dict[str, Raw]]) -> list[dict[str, Any]]:
    """Return the table by column, each value as the CSV file writes it."""
    kept = list(rows)
    names = dict.fromkeys(key for row in kept for key in row)
    return [{"name": name, **_coded(_as_written(row.get(name)) for row in kept)} for name in names]


def _as_written(value: Raw) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def _coded(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Return texts as indices into their distinct values, in order of appearance."""
    place: dict[str, int] = {}
    index = [place.setdefault(text, len(place)) for text in texts]
    return {"values": list(place), "index": index}


def _player(player: Player) -> dict[str, Any]:
    return {
        "steps": player.steps,
        "unit": player.unit,
        "colors": player.colors,
        "missing": THEME.get(player.missing, player.missing),
        "highest": player.highest,
        "panels": [
            {
                "gid": panel.gid,
                "first": panel.first_point,
                "titles": panel.titles,
                "at": panel.frame_at,
                "cells": len(panel.frames[0]),
                **_coded(text for frame in panel.frames for text in frame),
            }
            for panel in player.panels
        ],
    }
