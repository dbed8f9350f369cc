"""Readers of sets that packages hold: ELPV (a wheel), digits (scikit-learn), Fashion-MNIST (Debian's)."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import math
import struct
import sys
import sysconfig
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from peft_vit.data.decoding import decode_image
from peft_vit.data.files import hashes, open_tree
from peft_vit.data.index import ImageIndex
from peft_vit.errors import UserError
from peft_vit.packages import ELPV_WHEEL, cache_dir, check_download, fetch_wheel
from peft_vit.safe_io import LARGEST_BYTES, require_regular

_FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_MODULE_TYPES = ("mono", "poly")


def read_elpv(path: Path | None) -> ImageIndex:
    """Index the ELPV solar cells, out of the wheel or another zip or folder with its labels.csv.

    labels.csv has a line per image: path, defect probability (0, 1/3, 2/3 or 1) and module type (mono or
    poly), between spaces. The binary label is probability >= 0.5; strata are label x module type.

    Args:
        path: a zip or folder; None fetches the wheel.
    """
    tree = open_tree(path or fetch_wheel(ELPV_WHEEL))
    table = tree.only("labels.csv")
    base = PurePosixPath(table).parent
    present = set(tree.names)
    names, labels, modules = [], [], []
    for number, line in enumerate(tree.text(table).splitlines(), start=1):
        where = f"{tree.file(table)}:{number}"
        try:
            name, probability, module = line.split()
            if not 0 <= float(probability) <= 1:
                raise ValueError
            labels.append(int(float(probability) >= 0.5))
            modules.append(_MODULE_TYPES.index(module))
        except ValueError:
            raise UserError(f"expected 'path probability mono|poly', got {line[:80]!r}", file=where) from None
        names.append(str(base / name))
        if names[-1] not in present:
            raise UserError(f"{name} is not there; fetch the data set again", file=where)
    label = np.array(labels, dtype=np.int64)
    return ImageIndex(
        labels=label,
        strata=label * len(_MODULE_TYPES) + np.array(modules, dtype=np.int64),
        class_names=("functional", "defective"),
        official_test=None,
        sha256=tree.hashed([table, *names]).sha256,
        read=lambda i: decode_image(lambda: tree.read(names[i]), tree.file(names[i])),
        names=names,
    )


def read_digits(path: Path | None) -> ImageIndex:
    """Index scikit-learn's 1,797 handwritten digits; their 8 x 8 values 0..16 become grey levels 0..255."""
    if path is not None:
        raise UserError(
            "has no effect with dataset: digits, which comes with scikit-learn; remove it", field="data.path"
        )
    package = importlib.util.find_spec("sklearn")  # whose import takes 90 MB of memory
    assert package is not None
    assert package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")  # (N, 65)
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    labels = table[:, -1].astype(np.int64)
    return ImageIndex(
        labels=labels,
        strata=labels,
        class_names=tuple("0123456789"),
        official_test=None,
        sha256=hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest(),
        read=lambda i: Image.fromarray(pixels[i]),
    )


def read_fashion_mnist(path: Path | None) -> ImageIndex:
    """Index Fashion-MNIST from its four idx .gz files.

    Args:
        path: the folder that holds them; None looks where Debian's dataset-fashion-mnist puts them, then
            downloads.
    """
    folder = path or _fashion_folder()
    pixels, labels = [], []
    files: dict[str, Path] = {}
    for split in ("train", "t10k"):
        images_file = folder / f"{split}-images-idx3-ubyte.gz"
        labels_file = folder / f"{split}-labels-idx1-ubyte.gz"
        pixels.append(read_idx(images_file, dimensions=3))
        labels.append(read_idx(labels_file, dimensions=1).astype(np.int64))
        files |= {images_file.name: images_file, labels_file.name: labels_file}
        if len(pixels[-1]) != len(labels[-1]):
            raise UserError(f"holds {len(labels[-1])} labels for {len(pixels[-1])} images", file=labels_file)
        if labels[-1].size and labels[-1].max() >= len(_FASHION_CLASSES):
            raise UserError(f"holds label {labels[-1].max()}, expected 0 to 9; fetch it again", file=labels_file)
    label = np.concatenate(labels)
    is_test = np.arange(len(label)) >= len(labels[0])
    train, test = pixels
    return ImageIndex(
        labels=label,
        strata=label,
        class_names=_FASHION_CLASSES,
        official_test=is_test,
        sha256=hashes(files).sha256,
        read=lambda i: Image.fromarray(train[i] if i < len(train) else test[i - len(train)]),
    )


def _fashion_folder() -> Path:
    shares = (
        Path(sysconfig.get_path("data"), "share"),
        Path(sys.base_prefix, "share"),
        Path("/usr/local/share"),
        Path("/usr/share"),
    )
    for share in shares:
        if (share / "datasets" / "fashion-mnist").is_dir():
            return share / "datasets" / "fashion-mnist"
    root = cache_dir() / "downloads"
    if not (root / "FashionMNIST" / "raw").is_dir():
        check_download("Fashion-MNIST")
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)  # checks each file's md5
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
        raise UserError(
            f"Fashion-MNIST could not be downloaded ({reason}); install Debian's package "
            "dataset-fashion-mnist, or name the folder with its idx .gz files",
            field="data.path",
        ) from None
    return root / "FashionMNIST" / "raw"


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read an idx .gz file of unsigned bytes (format: yann.lecun.com/exdb/mnist, end of page).

    The header is 0, 0, 8 (unsigned byte), the number of dimensions, then each size as a big-endian 32-bit
    integer.

    Raises:
        UserError: if it is missing, broken, or of another shape than its header says.
    """
    start = 4 + 4 * dimensions
    try:
        require_regular(file.stat(), file)  # opening a pipe could wait for ever
        with gzip.open(file) as unzipped:
            header = unzipped.read(start)
            if len(header) < start or header[:4] != bytes((0, 0, 8, dimensions)):
                raise UserError(f"is no idx file of bytes in {dimensions} dimensions; fetch it again", file=file)
            shape = struct.unpack(f">{dimensions}I", header[4:])
            expected = math.prod(shape)
            if expected > LARGEST_BYTES:
                raise OSError(f"its header asks for {expected} bytes")
            values = unzipped.read(expected + 1)  # and no more of what may be a bomb
    except FileNotFoundError:
        raise UserError(
            "is missing; name the folder that holds the four idx .gz files", file=file, field="data.path"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"is not a readable .gz ({error}); fetch it again", file=file) from None
    if len(values) != expected:
        found = f"more than {expected}" if len(values) > expected else len(values)
        raise UserError(f"holds {found} values, its header says {shape}; fetch it again", file=file)
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)
