"""Image files of every kind against their samples, computed by NumPy."""

import io

import numpy as np
import pytest
from PIL import Image
from written_images import encoded, png_by_hand, png_of, tiff_of

from peft_vit.base.errors import UserError
from peft_vit.data import decode_image, to_pixels

WHITE = 255


def read(content):
    return decode_image(lambda: content, "x")


def seen(content, channels=3):
    """Return what training sees of a file at its own size, (H, W, C) int64."""
    image = read(content)
    assert image.width == image.height
    return to_pixels(image, image.width, channels).astype(np.int64)


def samples(channels, most, dtype="u1", side=8):
    values = np.random.default_rng(channels).integers(0, most, (side, side, channels), endpoint=True)
    values[0, 0], values[0, 1] = 0, most  # black and white of the format are among them
    return values.astype(dtype)


def upper(values):
    """Return the upper 8 of 16 bits."""
    return values.astype(np.int64) // 256


def over_white(colour, alpha):
    """Return c a + 255 (1 - a) for alpha (H, W, 1) of 0 to 255."""
    return (colour * alpha + WHITE * (255.0 - alpha)) / 255


def rgb(values):
    return np.broadcast_to(values, (*values.shape[:2], 3))


# --- depth ----------------------------------------------------------------------------------------------------------

GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6  # colour types of PNG
CHANNELS = {GREY: 1, RGB: 3, GREY_ALPHA: 2, RGBA: 4}


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind", CHANNELS)
def test_png(kind, depth):
    values = samples(CHANNELS[kind], 2**depth - 1, "u2")
    eight = values.astype(np.int64) if depth == 8 else upper(values)
    expected = rgb(over_white(eight[..., :-1], eight[..., -1:])) if kind in (GREY_ALPHA, RGBA) else rgb(eight)
    pixels = seen(png_of(values, depth, kind))
    if kind in (GREY, RGB):
        assert np.array_equal(pixels, expected)
        assert pixels[0, 0, 0] == 0
        assert pixels[0, 1, 0] == WHITE
    else:
        assert np.abs(pixels - expected).max() <= 1  # Pillow rounds twice


KINDS = [(order, *kind) for order in "<>" for kind in ((1, 1), (2, 3), (2, 4), (5, 4))]


@pytest.mark.parametrize(("order", "kind", "channels"), [("<", 0, 1), *KINDS])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_tiff(order, kind, channels, dtype):
    values = samples(channels, np.iinfo(dtype).max, dtype)
    eight = values.astype(np.int64) if dtype == "u1" else upper(values)
    if kind == 5:
        cmy, key = eight[..., :3], eight[..., 3:]
        expected = (255 - cmy) * (255 - key) / 255
    else:
        expected = over_white(eight[..., :3], eight[..., 3:]) if channels == 4 else rgb(eight)
    if kind == 0:  # white is zero
        expected = 255 - expected
    extra = {"extra": 2} if (kind, channels) == (2, 4) else {}  # an alpha that colours are not multiplied by
    pixels = seen(tiff_of(values, order, kind, **extra))
    assert np.abs(pixels - expected).max() <= (1 if channels == 4 else 0)
    if (kind, dtype) == (2, "u1") and channels == 3:
        assert np.array_equal(seen(tiff_of(values, order, kind, planar=True)), values)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_compressed_tiff_of_16_bits(compression):
    values = samples(1, 65_535, "u2")
    buffer = io.BytesIO()
    Image.fromarray(values[..., 0]).save(buffer, format="TIFF", compression=compression)
    assert np.array_equal(seen(buffer.getvalue()), rgb(upper(values)))


def test_tiff_of_12_bits():
    values = samples(1, 4095, "u2")
    a, b = values[..., 0].astype(np.int64)[:, 0::2], values[..., 0].astype(np.int64)[:, 1::2]
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=-1).reshape(8, 12, 1).astype("u1")
    content = bytearray(tiff_of(packed, "<", 1, bits=12))
    width = content.index(bytes([0, 1, 4, 0, 1, 0, 0, 0, 12]))  # tag 256: as many pixels as the rows hold
    content[width + 8] = 8
    assert np.array_equal(seen(bytes(content)), rgb(values.astype(np.int64) // 16))


def test_few_bits():
    values = np.random.default_rng(0).integers(0, 2, (8, 8)).astype(bool)
    for kind in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(seen(encoded(Image.fromarray(values), kind)), rgb(255 * values[..., None]))


# --- colour ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cmyk", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 200, 40, 0), (10, 20, 30, 128), (0, 0, 0, 255)])
def test_cmyk_jpeg(cmyk):
    content = encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG")
    assert b"Adobe" in content  # as Photoshop writes it, its inks are inverted
    expected = (255 - np.array(cmyk[:3])) * (255 - cmyk[3]) / 255
    assert np.abs(seen(content) - expected).max() <= 3  # what JPEG loses


def test_grey_jpeg_and_palette():
    level = encoded(Image.new("L", (16, 16), 77), "JPEG")
    assert read(level).mode == "L"
    assert np.abs(seen(level) - 77).max() <= 1
    image = Image.fromarray(samples(1, 2)[..., 0], mode="P")
    palette = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0]])
    image.putpalette(palette.ravel().tolist())
    assert np.array_equal(seen(encoded(image)), palette[samples(1, 2)[..., 0]])


# --- transparency ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_on_white(kind):
    colour, alpha = np.array([30, 120, 250]), samples(1, 255).astype(np.int64)
    pixels = np.concatenate([np.broadcast_to(colour, (8, 8, 3)), alpha], axis=-1).astype("u1")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert np.abs(seen(buffer.getvalue()) - over_white(colour, alpha)).max() <= 1


def test_palette_with_alpha_lies_on_white():
    index = samples(1, 2)[..., 0]
    palette, alpha = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0]]), np.array([0, 100, 255])
    image = Image.fromarray(index, mode="P")
    image.putpalette(palette.ravel().tolist())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=bytes(alpha.tolist()))
    assert np.abs(seen(buffer.getvalue()) - over_white(palette, alpha[:, None])[index]).max() <= 1


@pytest.mark.parametrize("depth", [1, 8])
def test_a_transparent_level_of_grey_is_white(depth):
    most = 2**depth - 1
    level = most // 2  # the samples hold others too
    values = samples(1, most, "u2")
    values[1, 1] = level
    if depth < 8:
        bits = (values[..., 0][..., None] >> np.arange(depth)[::-1] & 1).reshape(8, -1).astype("u1")
        rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
        content = png_by_hand(8, 8, depth, GREY, rows, (level,))
    else:
        content = png_of(values, depth, GREY, (level,))
    eight = values.astype(np.int64) * 255 // most
    expected = np.where(values == level, WHITE, eight)
    assert np.array_equal(seen(content), rgb(expected))


# --- orientation ----------------------------------------------------------------------------------------------------

# How the stored rows and columns come to stand upright, by EXIF 2.3, tag 274.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation(orientation):
    values = samples(3, 255)[:, :5]
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG", exif=exif)
    expected = UPRIGHT[orientation](values)
    assert np.array_equal(np.asarray(read(buffer.getvalue())), expected)
    deep = (values[..., :1].astype("u2") << 8) + 7
    for order in "<>":
        pixels = np.asarray(read(tiff_of(deep, order, 1, orientation=orientation)))
        assert np.array_equal(pixels, expected[..., 0])
    buffer = io.BytesIO()
    Image.fromarray(np.kron(values, np.ones((16, 16, 1), "u1"))).save(buffer, "JPEG", exif=exif, quality=95)
    small = read(buffer.getvalue()).resize(expected.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(np.asarray(small) - expected.astype(int)).max() < 25  # JPEG nearly keeps a square's mean


# --- what is not read right -----------------------------------------------------------------------------------------


def two_pages():
    buffer = io.BytesIO()
    pages = [Image.new("L", (8, 8), level) for level in (1, 2)]
    pages[0].save(buffer, format="TIFF", save_all=True, append_images=pages[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff_of(samples(1, 99, "u4"), "<", 1), r"pixels of mode I, of which no format says what is black .* 8 or 16"),
        (tiff_of(samples(1, 99, "i2"), "<", 1), r"pixels of mode I, "),
        (tiff_of(samples(1, 1, "f4"), "<", 1), r"pixels of mode F, "),
        (tiff_of(samples(3, 65_535, "u2"), "<", 2, planar=True), r"planes of their own; save it with interleaved"),
        (tiff_of(samples(1, 255), "<", 0, planar=True), r"planes of their own"),
        (png_of(samples(3, 65_535, "u2"), 16, RGB, (1, 2, 3)), r"a transparent colour and 2, 4 or 16 bits a channel"),
        (png_of(samples(1, 65_535, "u2"), 16, GREY, (1,)), r"a transparent colour and 2, 4 or 16 bits a channel"),
        (png_by_hand(8, 8, 2, GREY, bytes(24), (1,)), r"a transparent colour and 2, 4 or 16 bits a channel"),
        (two_pages(), r"holds several pages; save the one that is meant"),
    ],
    ids=[
        "32 bits",
        "signed",
        "floats",
        "planes of 16 bits",
        "a plane",
        "colour of 16 bits",
        "grey of 16 bits",
        "grey of 2 bits",
        "pages",
    ],
)
def test_what_is_not_read_right_is_refused(content, message):
    with pytest.raises(UserError, match=rf"^x: (has|holds) .*{message.removeprefix('holds ')}") as caught:
        read(content)
    assert "\n" not in str(caught.value)
