"""Colors of figures stay apart for readers with each of the three color-vision deficiencies.

Simulation: Machado, Oliveira and Fernandes (2009), severity 1, by daltonlens. Distance: CIELAB, by LittleCMS.
"""

import re
from importlib.resources import files
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from daltonlens.simulate import Deficiency, Simulator_Machado2009
from matplotlib.colors import to_hex
from numpy.typing import NDArray
from PIL import Image, ImageCms

from peft_vit.deploy.page.class_blocks import _BRIGHT, _ON_BRIGHT, _ON_DARK
from peft_vit.deploy.page.figure import INK, LINE_COLORS, METHOD_COLORS, MUTED, PAPER, SEQUENTIAL

CLOSEST = 12.5  # Delta E of 1976; about 2 can be seen side by side
_TO_LAB = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
SEEN_BY = pytest.mark.parametrize("deficiency", [None, Deficiency.PROTAN, Deficiency.DEUTAN, Deficiency.TRITAN])


def lab(colors: NDArray[np.uint8], deficiency: Deficiency | None) -> NDArray[np.float64]:
    """Return (colors, 3) lightness from 0 to 100, a and b, of (colors, 3) sRGB as such a reader sees them."""
    image = colors[None]
    if deficiency is not None:
        image = Simulator_Machado2009().simulate_cvd(image, deficiency, severity=1.0)
    converted = np.asarray(ImageCms.applyTransform(Image.fromarray(image), _TO_LAB))[0]  # a and b are signed bytes
    return np.column_stack([converted[:, 0] * (100 / 255), converted[:, 1:].astype(np.int8)])


def rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color.removeprefix("#")))


def contrast(first: str, other: str) -> float:
    """Return the ratio of WCAG 2.2: 4.5 and more is level AA for text."""
    linear = [
        np.where((c := np.array(rgb(x)) / 255) <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        for x in (first, other)
    ]
    dark, bright = sorted(float(channels @ (0.2126, 0.7152, 0.0722)) for channels in linear)
    return (bright + 0.05) / (dark + 0.05)


def test_texts_of_figures_can_be_read_in_light_and_dark() -> None:
    """What axe can't see: they are drawn on a figure's paper."""
    style = files("peft_vit.deploy.page").joinpath("templates", "colors.css").read_text(encoding="utf-8")
    themes = [dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in style.split(":root {")[1:3]]
    assert [theme["paper"] for theme in themes] == [PAPER, "#171b20"]
    assert (themes[0]["ink"], themes[0]["muted"]) == (INK, MUTED)
    for theme in themes:
        assert min(contrast(theme[ink], theme["paper"]) for ink in ("ink", "muted")) >= 4.5


def test_numbers_on_cells_of_a_confusion_matrix_can_be_read() -> None:
    for share in np.linspace(0, 1, 201):
        cell = to_hex(matplotlib.colormaps[SEQUENTIAL](share))
        assert contrast(_ON_BRIGHT if share > _BRIGHT else _ON_DARK, cell) >= 4.5


@SEEN_BY
@pytest.mark.parametrize("colors", [tuple(METHOD_COLORS.values()), LINE_COLORS], ids=["methods", "lines"])
def test_all_pairs_stay_apart(colors: tuple[str, ...], deficiency: Deficiency | None) -> None:
    seen = lab(np.array([rgb(color) for color in colors], dtype=np.uint8), deficiency)
    near = {
        (colors[i], colors[j]): distance
        for i, j in combinations(range(len(colors)), 2)
        if (distance := float(np.linalg.norm(seen[i] - seen[j]))) < CLOSEST
    }
    assert not near


@SEEN_BY
def test_heat_maps_go_from_dark_to_bright(deficiency: Deficiency | None) -> None:
    colors = np.round(255 * matplotlib.colormaps[SEQUENTIAL](np.linspace(0, 1, 11))[:, :3]).astype(np.uint8)
    assert (np.diff(lab(colors, deficiency)[:, 0]) > 2).all()
