"""Copies that are not equal: saved again, cropped, mirrored, shifted, and frames of one film that differ by little.

Images are compared as thumbnails of 32 x 32 pixels: by their mean colors, and in grey. Of each the images with the most
similar blurred thumbnail, as they are or mirrored, are candidates. A candidate is moved, scaled and turned a little
until it correlates with the other one, by Gauss-Newton steps (Evangelidis and Psarakis 2008, "Parametric Image
Alignment Using Enhanced Correlation Coefficient Maximization"). If what is finer than a blur then correlates as well,
the two are copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

SIDE = 32  # pixels of a thumbnail
_NEIGHBOURS, _LEAST_BLURRED = 8, 0.8  # candidates of an image, and how well they correlate at least
_LEAST, _LEAST_DETAIL = 0.98, 4.0  # correlation of copies; grey levels by which what is flat deviates at most
_MOST_COLOR = 8.0  # levels by which mean colors differ beside brightness
_LARGEST = np.array([0.15, 0.12, 0.35, 0.35], np.float32)  # scale, turn in radians, shifts in half sides
_LEAST_COARSE = 0.93  # correlation of blurred images once they are aligned, also after two of five steps
_LEAST_LIKELY = 0.8  # of details then; of planted copies of stamps, emoji and digits that are found 0.87 or more
_BLOCK, _PAIRS = 1024, 128  # images whose candidates are looked for at once, and pairs that are aligned, in the cache


def copy_pairs(thumbnails: NDArray[np.float16]) -> NDArray[np.int64]:
    """Return pairs of images that are copies, (M, 2), the lower number first.

    Args:
        thumbnails: (N, 32, 32, 3), see `compared_thumbnail`.
    """
    count, grey = len(thumbnails), thumbnails.mean(3, dtype=np.float32)  # (N, 32, 32)
    colors = thumbnails.mean((1, 2), dtype=np.float32) - grey.mean((1, 2))[:, None]  # (N, 3)
    blurred = _blur(grey, 2.0)[:, ::2, ::2].reshape(count, -1)  # (N, 256)
    blurred = blurred - blurred.mean(1, keepdims=True)
    blurred = blurred / np.maximum(np.linalg.norm(blurred, axis=1, keepdims=True), 1e-6)
    detailed = np.concatenate([_is_detailed(grey[start : start + _BLOCK]) for start in range(0, count, _BLOCK)])
    found = [np.empty((0, 2), np.int64)]
    for is_mirrored in (False, True):
        others = blurred.reshape(-1, SIDE // 2, SIDE // 2)[:, :, ::-1].reshape(count, -1) if is_mirrored else blurred
        candidates = _candidates(blurred, others, detailed)
        candidates = candidates[np.abs(colors[candidates[:, 0]] - colors[candidates[:, 1]]).max(1) <= _MOST_COLOR]
        for start in range(0, len(candidates), _PAIRS):
            pairs = candidates[start : start + _PAIRS]
            second = grey[pairs[:, 1]]
            alike = _alignment(grey[pairs[:, 0]], second[:, :, ::-1] if is_mirrored else second)
            found.append(pairs[alike >= _LEAST])
    return np.unique(np.concatenate(found), axis=0)


def with_first(keys: Sequence[Any] | NDArray[Any]) -> NDArray[np.int64]:
    """Return pairs of places (N, 2): each of N with the first one that has the same key."""
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    return np.stack([np.arange(len(keys)), first[number]], axis=1)


def groups_of(groups: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return groups (N,) once those are one that a chain of pairs (M, 2) links; what is in none, -1, stays so."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = groups.max(initial=0) + 1
    links = coo_array((np.ones(len(pairs), dtype=bool), groups[pairs].T), shape=(count, count))
    joined: NDArray[np.int64] = connected_components(links, directed=False)[1].astype(np.int64)
    return np.where(groups < 0, -1, joined[groups])


def several(groups: np.ndarray) -> list[list[int]]:
    """Return the members of every group that has several; what could not be read is in none, -1."""
    order = np.argsort(groups, kind="stable")
    order = order[groups[order] >= 0]
    cuts = np.flatnonzero(np.diff(groups[order])) + 1
    return [part.tolist() for part in np.split(order, cuts) if len(part) > 1]


def compared_thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Return the thumbnail (32, 32, 3) of an image (64, 64, 3), or thumbnails (N, 32, 32, 3) of several.

    Means of four values of 8 bits, which 16 bits hold exactly.
    """
    halves = pixels.astype(np.float32).reshape(*pixels.shape[:-3], SIDE, 2, SIDE, 2, -1)
    return halves.mean((-4, -2)).astype(np.float16)  # (..., 32, 2, 32, 2, 3) -> (..., 32, 32, 3)


def _candidates(first: Floats, second: Floats, usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return pairs (P, 2) of each image with those that correlate most with it, of unit vectors (N, D) both."""
    count, found = len(first), [np.empty((0, 2), np.int64)]
    most = min(_NEIGHBOURS, count)
    for start in range(0, count, _BLOCK):
        alike = first[start : start + _BLOCK] @ second.T  # (B, N)
        rows = np.arange(len(alike))
        alike[rows, start + rows] = -1
        alike[:, ~usable] = -1
        alike[~usable[start : start + _BLOCK]] = -1
        few = alike >= _LEAST_BLURRED
        for crowded in np.flatnonzero(few.sum(1) > most):
            few[crowded] = False
            few[crowded, np.argpartition(-alike[crowded], most - 1)[:most]] = True
        row, place = np.nonzero(few)
        found.append(np.sort(np.stack([start + row, place], 1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _alignment(first: Floats, second: Floats) -> Floats:
    """Return how well details correlate once the second image is aligned to the first, (B,), of (B, 32, 32) both."""
    p = np.zeros((len(first), 4), np.float32)  # scale, turn, shifts
    result = np.zeros(len(first), np.float32)
    coarse = _blur(first, 2.0)[:, ::2, ::2], _blur(second, 2.0)[:, ::2, ::2]
    near = np.arange(len(first))
    for steps in (2, 3):
        p[near] = _aligned(coarse[0][near], coarse[1][near], p[near], steps)
        near = near[_correlation(coarse[0][near], coarse[1][near], p[near]) >= _LEAST_COARSE]
    first, second = first[near], second[near]
    likely = _correlation(_fine(first), _fine(second), p[near]) >= _LEAST_LIKELY
    near, first, second = near[likely], first[likely], second[likely]
    moved = _aligned(_blur(first, 0.8), _blur(second, 0.8), p[near], 4)
    result[near] = _correlation(_fine(first), _fine(second), moved)
    return result


def _correlation(first: Floats, second: Floats, p: Floats) -> Floats:
    """Return it where images (B, S, S) overlap once the second ones are moved by p (B, 4), (B,)."""
    (w,), inside = _warped((second,), p)  # (B, S * S)
    share = inside.sum(1)[:, None]  # (B, 1)
    alike: Floats = (
        _standardized(first.reshape(len(first), np.prod(first.shape[1:])), inside, share)[0]
        * _standardized(w, inside, share)[0]
    )
    return alike.sum(1) / share[:, 0]


def _aligned(first: Floats, second: Floats, p: Floats, steps: int) -> Floats:
    """Return p (B, 4) after Gauss-Newton steps that let images (B, S, S) correlate more."""
    side = first.shape[1]
    y, x = _grid(side)  # (P,)
    dy, dx = np.gradient(second, 2 / (side - 1), axis=(1, 2))  # (B, S, S)
    target = first.reshape(len(first), np.prod(first.shape[1:]))  # (B, P)
    for _ in range(steps):
        (w, gx, gy), inside = _warped((second, dx, dy), p)  # (B, P)
        share = inside.sum(1)[:, None]  # (B, 1)
        w, scale = _standardized(w, inside, share)
        t, _ = _standardized(target, inside, share)
        jacobian = np.stack([gx * x + gy * y, gy * x - gx * y, gx, gy], 1) * (inside / scale)[:, None]  # (B, 4, P)
        jacobian -= (jacobian.sum(2) / share)[..., None] * inside[:, None]
        along = (jacobian @ w[..., None]) / share[..., None]  # (B, 4, 1)
        jacobian -= along * w[:, None]
        normal = jacobian @ jacobian.transpose(0, 2, 1) + np.float32(1e-3) * np.eye(4, dtype=np.float32)
        p = np.clip(p + np.linalg.solve(normal, jacobian @ (t - w)[..., None])[..., 0], -_LARGEST, _LARGEST)
    return p


def _grid(side: int) -> list[Floats]:
    """Return y and x of all pixels of a square, (side * side,) each, from -1 to 1."""
    at = np.linspace(-1, 1, side, dtype=np.float32)
    return [places.ravel() for places in np.meshgrid(at, at, indexing="ij")]


def _warped(images: tuple[Any, ...], p: Floats) -> tuple[list[Floats], Floats]:
    """Return images (B, S, S) at moved places, (B, P) each, and which of these lie inside, as 0 and 1."""
    side = images[0].shape[1]
    y, x = _grid(side)  # (P,)
    a, b, shift_x, shift_y = p.T[..., None]  # (B, 1)
    column = ((1 + a) * x - b * y + shift_x + 1) * (side - 1) / 2  # (B, P)
    row = (b * x + (1 + a) * y + shift_y + 1) * (side - 1) / 2
    inside = ((column >= 0) & (column <= side - 1) & (row >= 0) & (row <= side - 1)).astype(np.float32)
    left, top = (np.clip(place.astype(np.int32), 0, side - 2) for place in (column, row))
    u, v = np.clip(column - left, 0, 1), np.clip(row - top, 0, 1)
    at = (np.arange(len(p))[:, None] * side + top) * side + left
    moved = []
    for image in images:
        flat = image.ravel()
        upper = flat.take(at) * (1 - u) + flat.take(at + 1) * u
        moved.append(upper * (1 - v) + (flat.take(at + side) * (1 - u) + flat.take(at + side + 1) * u) * v)
    return moved, inside


def _standardized(values: Floats, inside: Floats, share: Floats) -> tuple[Floats, Floats]:
    """Return values (B, P) less their mean inside, in standard deviations, 0 outside; and these deviations (B, 1)."""
    centred = (values - (values * inside).sum(1, keepdims=True) / share) * inside
    scale = np.sqrt((centred**2).sum(1, keepdims=True) / share) + np.float32(1e-6)
    return centred / scale, scale


def _blur(images: Floats, pixels: float) -> Floats:
    """Return images (N, 32, 32) after a Gaussian of so many pixels."""
    at = np.arange(SIDE)
    kernel = np.exp(-((at[:, None] - at) ** 2) / (2 * pixels**2)).astype(np.float32)
    kernel /= kernel.sum(1, keepdims=True)
    blurred: Floats = kernel @ images @ kernel.T
    return blurred


def _fine(images: Floats) -> Floats:
    """Return what of images (N, 32, 32) is finer than a blur, and coarser than noise."""
    return _blur(images, 0.6) - _blur(images, 2.5)


def _is_detailed(images: Floats) -> NDArray[np.bool_]:
    """Return whether images (B, 32, 32) show more than lines from side to side, as of a grid, (B,)."""
    fine = _fine(images)
    lines = fine.mean(1, keepdims=True) + fine.mean(2, keepdims=True)
    detailed: NDArray[np.bool_] = (fine - lines).std((1, 2)) >= _LEAST_DETAIL
    return detailed
