"""Files as data sets hold them: a folder or zip read in place, content hashes, downloads, unpacked tars."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from peft_vit.errors import UserError
from peft_vit.packages import cache_dir, sha256_of
from peft_vit.records import write_atomically

_HIDDEN = re.compile(r"(^|/)(\.|__MACOSX/)")  # hidden files, and what macOS adds to zips
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class FileTree:
    """The files below a folder, or inside a zip, which is read in place and never unpacked.

    Attributes:
        location: the folder or the zip.
        names: relative names with '/', sorted.
        read: returns the content of the file with a given name.
        sha256: returns the hash of the zip, or of the folder's files with the given names.
    """

    location: Path
    names: tuple[str, ...]
    read: Callable[[str], bytes]
    sha256: Callable[[list[str]], str]

    def file(self, name: str) -> str:
        """Return what to call a file in an error."""
        return str(self.location / name)

    def text(self, name: str) -> str:
        """Return a file's text; raises UserError if it is broken or not UTF-8."""
        try:
            content = self.read(name)
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"cannot be read ({error}); fetch it again", file=self.file(name)) from None
        return decode_text(content, self.file(name))

    def only(self, ending: str) -> str:
        """Return the one name that ends with the parts `ending`; raises UserError if not exactly one does."""
        found = [name for name in self.names if f"/{name}".endswith(f"/{ending}")]
        if len(found) != 1:
            raise UserError(
                f"holds {len(found)} files called {ending}, expected one; "
                "name the data set's own folder or archive", file=self.location, field="data.path",
            )  # fmt: skip
        return found[0]


def decode_text(content: bytes, file: str | Path) -> str:
    """Return UTF-8 text without a byte order mark; raises UserError for other encodings."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text; save it as UTF-8", file=file) from None


def open_tree(location: Path) -> FileTree:
    """Open a folder or a zip (a wheel is one).

    Raises:
        UserError: if it is neither, or if a link in the folder leads out of it.
    """
    if location.is_dir():
        root = location.resolve()
        names = tuple(sorted(_names_below(root)))
        return FileTree(
            root, names, lambda name: (root / name).read_bytes(),
            lambda used: content_sha256({name: root / name for name in used}),
        )  # fmt: skip
    try:
        archive = zipfile.ZipFile(location)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"is neither a folder nor a zip ({error})", file=location, field="data.path") from None
    members = (info.filename for info in archive.infolist() if not info.is_dir())
    names = tuple(sorted(name for name in members if not _HIDDEN.search(name)))
    return FileTree(location, names, archive.read, lambda _: content_sha256({"": location}))


def _names_below(root: Path) -> Iterator[str]:
    # Plain strings: a path object for each of 100,000 files takes seconds.
    for folder, subfolders, files in os.walk(root):
        if not subfolders and not files:
            raise UserError("is an empty folder; fill it or remove it", file=folder)
        for entry in (*subfolders, *files):
            path = os.path.join(folder, entry)
            if not _is_unicode(entry):  # neither a record nor a page could hold the class
                raise UserError("has a name that is not UTF-8; rename it", file=path)
            if os.path.islink(path):
                refuse_outside(Path(path), root)
                if os.path.isdir(path):
                    raise UserError("is a link to a folder, which is not followed; copy the folder", file=path)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = "" if Path(folder) == root else f"{Path(folder).relative_to(root).as_posix()}/"
        yield from (prefix + name for name in files if not name.startswith("."))


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def refuse_outside(path: Path, root: Path) -> None:
    """Raise UserError if a path, with its links followed, does not lie below `root` (already resolved)."""
    if not path.resolve().is_relative_to(root):
        raise UserError(f"leads out of {root}; copy the file into it", file=path)


def content_sha256(files: Mapping[str, Path]) -> str:
    """Return the hash of one file, or of the names and contents of several.

    Hashing a large folder takes as long as reading it, so the result is remembered in the cache while every
    path, size and modification time stays the same.
    """
    stamp = hashlib.sha256()
    try:
        for name, path in sorted(files.items()):
            status = path.stat()
            line = f"{name}\0{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\n"
            stamp.update(line.encode(errors="surrogateescape"))  # folders above may have names of any bytes
        memo = cache_dir() / "hashes" / stamp.hexdigest()
        if memo.is_file() and re.fullmatch(r"[0-9a-f]{64}", known := memo.read_text()):
            return known
        hashes = {name: sha256_of(path) for name, path in sorted(files.items())}
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=error.filename) from None
    lines = "".join(f"{name}\0{digest}\n" for name, digest in hashes.items())
    result = hashes.popitem()[1] if len(hashes) == 1 else hashlib.sha256(lines.encode()).hexdigest()
    write_to_cache(memo, result.encode())
    return result


def write_to_cache(file: Path, content: bytes) -> None:
    """Write a file of the cache atomically; raises UserError if the cache cannot be written."""
    try:
        write_atomically(file, content)
    except OSError as error:
        raise cache_not_writable(file, error) from None


def cache_not_writable(file: Path, error: OSError) -> UserError:
    """Return the error for a cache without space or permission."""
    return UserError(
        f"cannot be written ({error.strerror}); free space, or set PEFT_VIT_CACHE to another folder",
        file=file,
    )


def existing(path: str) -> Path:
    """Return the path, `~` expanded; raises UserError if nothing is there."""
    expanded = os.path.expanduser(path)
    if not os.path.exists(expanded):  # unlike Path.exists, also False for an impossible name
        raise UserError("does not exist; correct the path", file=expanded, field="data.path")
    return Path(expanded)


def downloaded(url: str, md5: str) -> Path:
    """Return the path of a cached download, fetched once and checked before it takes its name.

    Raises:
        UserError: if it cannot be fetched or has another hash; says where to put the file by hand.
    """
    name = PurePosixPath(url).name
    file = cache_dir() / "downloads" / name
    if file.is_file():
        return file
    from torchvision.datasets.utils import download_url

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        try:
            download_url(url, temporary, name, md5)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"could not be downloaded ({error}); set data.path to a folder that holds {name}", file=url
            ) from None
        return Path(temporary, name).replace(file)


def unpacked(archive: Path, wanted: tuple[str, ...], sha256: str) -> Path:
    """Return a cache folder with the wanted members of a tar.gz, found by their last name and unpacked once.

    Only these names are written, so no member can leave the folder.

    Raises:
        UserError: if the archive is broken or lacks one of them.
    """
    folder = cache_dir() / "unpacked" / sha256[:32]
    missing = {name for name in wanted if not (folder / name).is_file()}
    if not missing:
        return folder
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                content = tar.extractfile(member) if name in missing and member.isfile() else None
                if content is not None:
                    write_to_cache(folder / name, content.read())
                    missing.remove(name)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"is not a readable tar.gz ({error}); fetch it again", file=archive) from None
    if missing:
        raise UserError(f"holds no {sorted(missing)[0]}; fetch the binary archive", file=archive)
    return folder
