"""Files as data sets hold them: a folder or zip read in place, patterns, content hashes, downloads."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import tarfile
import tempfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter

from peft_vit.base.errors import UserError, foreign_fault, os_fault
from peft_vit.base.extras import require_extra
from peft_vit.base.files import LARGEST_BYTES, read_bytes, require_regular, sha256_of, write_atomically
from peft_vit.base.packages import cache_dir, check_download

HIDDEN = re.compile(r"(^|/)(\.|__MACOSX(/|$))")  # hidden files, and what macOS adds to zips
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".jfif", ".gif", ".avif", ".heic", ".heif")
_THREADS, _AHEAD = 8, 64  # of `in_threads`: at most, and items that may be done before they are asked for
_OF_CONTENT = (errno.EFBIG, errno.EINVAL)  # a file that is too large, an archive that names an impossible place
FETCH_AGAIN = "fetch it again"
SHARDS = (".tar", ".tar.gz", ".tgz")  # the latter ones are refused
_ADDRESS = re.compile(r"([a-z][a-z0-9]+):/+(.+)")  # of which pathlib has taken a slash
_BRACE = re.compile(r"\{(?:(\d+)\.\.(\d{1,6})|([^{}]*,[^{}]*))\}")
_MAGIC = re.compile(r"[*?\[{]")
_FETCHED = ".fetched"  # beside shards, of which none is missing
_PACKAGE_OF = {"s3": "s3fs", "http": "aiohttp", "https": "aiohttp"}

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Hashes(NamedTuple):
    """Hash of one file, or of the names and contents of several; and by name what is equal for equal contents alone."""

    sha256: str
    each: Mapping[str, str]

    @classmethod
    def of(cls, each: Mapping[str, str]) -> Hashes:
        """Return the hash of several files by their own hashes."""
        lines = "".join(f"{name}\0{digest}\n" for name, digest in each.items())
        return cls(hashlib.sha256(lines.encode()).hexdigest(), each)


@dataclass(frozen=True)
class FileTree:
    """The files below a folder, or inside a zip, which is read in place and never unpacked.

    Attributes:
        location: the folder or the zip.
        names: relative names with '/', sorted.
        read: returns the content of the file with a given name.
        hashed: hashes the zip, or the folder's files with the given names, and distinguishes these files.
        unused: folders of which no file is among the names; see `files_below`.
        base: what names begin at in errors; None: the location.
    """

    location: Path
    names: tuple[str, ...]
    read: Callable[[str], bytes]
    hashed: Callable[[list[str]], Hashes]
    unused: Mapping[str, str] = field(default_factory=dict)
    base: Path | None = None

    def file(self, name: str) -> str:
        """Return what to call a file in an error."""
        return str((self.base or self.location) / name)

    def below(self, folder: str) -> FileTree:
        """Return the part of it below a folder, a relative name; "" is all of it."""
        if not folder:
            return self
        start = f"{folder}/"

        def hashed(names: list[str]) -> Hashes:
            sha256, each = self.hashed([start + name for name in names])
            return Hashes(sha256, {name.removeprefix(start): mark for name, mark in each.items()})

        names = tuple(name.removeprefix(start) for name in self.names if name.startswith(start))
        unused = {name.removeprefix(start): at for name, at in self.unused.items() if name.startswith(start)}
        return FileTree(self.location / folder, names, lambda name: self.read(start + name), hashed, unused)

    def fault(self, name: str) -> str | None:
        """Return why a file can't even be opened, such as a link to nothing; None if it can, or lies in a zip."""
        path = self.location / name
        if not self.location.is_dir():
            return None
        try:
            require_regular(path.stat(), path)
        except (OSError, ValueError) as error:  # a NUL in its name
            return f"can't be read ({getattr(error, 'strerror', error)})"
        return None if os.access(path, os.R_OK) else "can't be read (Permission denied)"

    def lines(self, name: str) -> list[str]:
        """Return a text file's lines; raises UserError if it is broken or not UTF-8."""
        with foreign_fault("cannot be read", self.file(name), remedy=FETCH_AGAIN):
            content = self.read(name)
        return decode_text(content, self.file(name)).splitlines()

    def only(self, ending: str) -> str:
        """Return the one name that ends with the parts `ending`; raises UserError if not exactly one does."""
        matching = [name for name in self.names if f"/{name}".endswith(f"/{ending}")]
        if len(matching) != 1:
            raise UserError(
                f"holds {len(matching)} files called {ending}, expected one; name the data set's own folder or archive",
                file=self.location,
                field="data.path",
            )
        return matching[0]


def decode_text(content: bytes, file: str | Path, remedy: str = "save it as UTF-8") -> str:
    """Return UTF-8 text without a byte order mark; raises UserError for other encodings."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"is not UTF-8 text; {remedy}", file=file) from None


def existing(path: str) -> Path:
    """Return the path, `~` expanded; of shards elsewhere, where they are fetched to.

    Raises:
        UserError: if nothing is there.
    """
    expanded = os.path.expanduser(path)
    if os.path.exists(expanded):  # unlike Path.exists, also False for an impossible name
        return Path(expanded)
    if address := _ADDRESS.fullmatch(expanded):
        return fetched_shards(f"{address[1]}://{address[2]}")
    if not expanded.lower().endswith(SHARDS) or not matching(Path(expanded)):
        raise UserError("does not exist; correct the path", file=expanded, field="data.path")
    return Path(expanded)


def fixed_part(pattern: Path) -> Path:
    """Return the folder that all files lie below which a pattern matches."""
    return next(folder for folder in pattern.parents if not _MAGIC.search(str(folder)))


def matching(pattern: Path) -> list[Path]:
    """Return the files that a pattern matches, as in a shell, {00..12} and ** included; or the one it names."""
    found = {file for text in expanded_braces(str(pattern)) for file in glob.glob(text, recursive=True)}
    return sorted(map(Path, found or ([str(pattern)] if pattern.is_file() else [])))


def expanded_braces(pattern: str) -> list[str]:
    """Return what a pattern stands for whose braces hold a range, {00..12}, or names, {train,test}."""
    if (brace := _BRACE.search(pattern)) is None:
        return [pattern]
    first, last, names = brace.groups()
    parts = names.split(",") if names else [f"{k:0{len(first)}}" for k in range(int(first), int(last) + 1)]
    start, end = pattern[: brace.start()], pattern[brace.end() :]
    return [text for part in parts for text in expanded_braces(start + part + end)]


def open_tree(location: Path) -> FileTree:
    """Open a folder or a zip (a wheel is one).

    Raises:
        UserError: if it is neither, or as `files_below`.
    """
    if location.is_dir():
        root, unused = location.resolve(), dict[str, str]()
        return FileTree(
            root,
            files_below(root, unused=unused),
            lambda name: read_bytes(root / name),
            lambda used: hashes({name: root / name for name in used}),
            unused,
        )
    with foreign_fault("is neither a folder nor a zip", location, remedy="name one of the two", field="data.path"):
        if not location.is_file():  # opening a pipe could wait for ever
            raise zipfile.BadZipFile("is not a regular file")
        archive = zipfile.ZipFile(location)
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename
        fault = ""
        if not name or name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name:
            fault = "a file of the name {!r}, which leads out of it or is none"
        elif name in members:
            fault = "{!r} twice, which could land in train and test"
        if fault:
            raise UserError(f"holds {fault.format(name)}; pack it again", file=location)
        if not info.is_dir() and not HIDDEN.search(name):
            members[name] = info
    return FileTree(
        location,
        tuple(sorted(members)),
        lambda name: _read_member(archive, members[name]),
        lambda used: Hashes(
            hashes({"": location}).sha256, _fingerprints(archive, {name: members[name] for name in used})
        ),
    )


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a member's content, of which zipfile unpacks no more than is asked for if it is deflated."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile("compressed with another method than deflate")
    with archive.open(info) as member:
        content = member.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise zipfile.BadZipFile(f"larger than {LARGEST_BYTES} bytes")
    return content


def _fingerprints(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> dict[str, str]:
    """Return what shows members apart; only those are unpacked that agree with another one in checksum and size."""
    marks = {name: f"{info.CRC} {info.file_size}" for name, info in members.items()}
    counts = Counter(marks.values())
    for name, mark in marks.items():
        if counts[mark] > 1:
            try:
                marks[name] = hashlib.sha256(_read_member(archive, members[name])).hexdigest()
            except Exception as error:  # a foreign archive can fail in any way; who decodes the image says so
                raise_if_transient(error, f"{archive.filename}/{name}")
                marks[name] = name
    return marks


def raise_if_transient(error: Exception, file: str) -> None:
    """Raise UserError if a file could not be read for a reason of this machine, which says nothing of its content."""
    cause = error.__context__ if isinstance(error, UserError) else error
    reason = "not enough memory" if isinstance(cause, MemoryError) else None
    if isinstance(cause, OSError) and cause.errno not in (None, *_OF_CONTENT):
        reason = cause.strerror
    if reason is not None:
        raise UserError(f"can't be read now ({reason}); call again once that is over", file=file) from None


def files_below(
    root: Path, closed: list[UserError] | None = None, unused: dict[str, str] | None = None
) -> tuple[str, ...]:
    """Return the sorted names of the files below a folder, but hidden ones.

    Links are followed. Each folder is read once: where it really is, if that is below `root`, else by the first of the
    highest links to it.

    Args:
        root: the folder.
        closed: is given the error of each folder that can't be read, and names may be any bytes; None: the first fault
            is raised.
        unused: is given by name, with a '/' at its end, each folder that is empty, "", or a link to a folder that is
            read elsewhere, there; links to folders above themselves are not reported.

    Raises:
        UserError: if a folder can't be read, or a name is not UTF-8.
    """
    names: list[str] = []
    read_at: dict[tuple[int, int], str | None] = {
        (status.st_dev, status.st_ino): None for status in map(os.stat, root.resolve().parents)
    }
    folders, links = deque([""]), deque[str]()
    while folders or links:
        name = (folders or links).popleft()
        folder, prefix = os.path.join(root, name), f"{name}/" if name else ""
        try:
            status = os.stat(folder)
            place = (status.st_dev, status.st_ino)
            if place in read_at:
                at = read_at[place]
                if unused is not None and at is not None and not prefix.startswith(at):
                    unused[prefix] = at
                continue
            read_at[place] = prefix
            with os.scandir(folder) as found:  # which says without another call what is a folder, but for links
                entries = sorted(
                    (
                        entry.name,
                        os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir(),
                        entry.is_symlink(),
                    )
                    for entry in found
                    if not HIDDEN.match(entry.name)
                )
        except OSError as error:
            message = f"can't be read ({error.strerror}); make it readable, or remove it"
            fault = UserError(message, file=error.filename)
            if closed is None:
                raise fault from None
            closed.append(fault)
            continue
        if name and not entries and unused is not None:
            unused[prefix] = ""
        for entry, is_folder, is_link in entries:
            if closed is None and any("\ud800" <= character <= "\udfff" for character in entry):  # no record holds it
                raise UserError("has a name that is not UTF-8; rename it", file=os.path.join(folder, entry))
            if not is_folder:
                names.append(prefix + entry)
            else:
                (links if is_link else folders).append(prefix + entry)
    return tuple(sorted(names))


# --- hashes and the cache ---------------------------------------------------------------------------------------------


def hashes(files: Mapping[str, Path]) -> Hashes:
    """Hash files by their names.

    Hashing a large folder takes as long as reading it, so each file's hash is remembered, see `read_once`.
    """

    def sha256(file: Path) -> str:
        with os_fault("cannot be read", file):
            return sha256_of(file)

    each = read_once("hashes", dict(sorted(files.items())), sha256)
    return Hashes(next(iter(each.values())), each) if len(each) == 1 else Hashes.of(each)


def read_once(kind: str, files: Mapping[str, Path], read: Callable[[Path], str]) -> dict[str, str]:
    """Return what reading each of some files gives, by name; those that are as they were are not opened again.

    What is known of all files below the folder that these share is one file of the cache.

    Args:
        kind: of what is read; a folder of the cache.
        files: by name.
        read: what it says of a file.

    Raises:
        UserError: if a file can't be read, or the cache not written.
    """
    if not files:
        return {}
    places = {name: os.path.abspath(path) for name, path in files.items()}
    shared = os.path.commonpath([min(places.values()), max(places.values())])
    memo = cache_dir() / kind / hashlib.sha256(os.fsencode(shared)).hexdigest()
    known: dict[str, tuple[str, str]] = {}  # stamp of a file and what was read, by its place below the shared folder
    with suppress(OSError, ValueError):  # none, or damaged
        known = TypeAdapter(dict[str, tuple[str, str]]).validate_json(memo.read_bytes())
    below = {name: place[len(shared) :] for name, place in places.items()}
    stamps = {name: _stamp(place) for name, place in places.items()}
    changed = [name for name, stamp in stamps.items() if known.get(below[name], ("",))[0] != stamp]
    if changed:
        values = in_threads(read, [files[name] for name in changed])
        known |= {below[name]: (stamps[name], value) for name, value in zip(changed, values, strict=True)}
        with cache_fault(memo):
            write_atomically(memo, json.dumps(known, separators=(",", ":")).encode())
    return {name: known[place][1] for name, place in below.items()}


def _stamp(file: str | Path) -> str:
    """Return what the system says of a file: size, inode, and times of modification and of change.

    A copy may bring the first time along (`cp -p`, `rsync -t`), the second one is the system's own.

    Raises:
        UserError: if it is not there, or not a regular file.
    """
    with os_fault("cannot be read", Path(file)):
        status = os.stat(file)
        require_regular(status, file)
    return f"{status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"


def stamps(files: Mapping[str, Path]) -> str:
    """Return the names and paths of files with what the system says of them, see `_stamp`, as a key of `remembered`."""
    return "".join(f"{name}\0{os.path.abspath(path)}\0{_stamp(path)}\n" for name, path in files.items())


def remembered(kind: str, key: str, compute: Callable[[], Any], read: Callable[[Any], _Result]) -> _Result:
    """Return what is computed, or the cache has by a key, as it is read; what can't be read is computed again.

    Args:
        kind: folder of the cache.
        key: what it depends on.
        compute: plain values or arrays, as JSON holds them.
        read: what they say; raises for those that were damaged.

    Raises:
        UserError: if the cache can't be written.
    """
    digest = hashlib.sha256(key.encode(errors="surrogateescape"))  # folders above may have names of any bytes
    file = cache_dir() / kind / f"{digest.hexdigest()[:32]}.json"
    with suppress(Exception):  # whatever was in its place, it is not this package's file
        return read(json.loads(read_bytes(file)))
    made = compute()
    with cache_fault(file):
        write_atomically(file, json.dumps(made, default=lambda array: array.tolist()).encode())
    return read(made)


def in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """Yield what a function returns of each item, in their order, computed by a few threads a little ahead."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), _AHEAD):
            yield from pool.map(function, items[start : start + _AHEAD])


def cache_fault(file: Path) -> AbstractContextManager[None]:
    """Make of an OSError, in writing a file of the cache, a UserError that says what to do."""
    return os_fault("cannot be written", file, remedy="free space, or set PEFT_VIT_CACHE to another folder")


@contextmanager
def new_in_cache(target: Path) -> Iterator[Path]:
    """Give a path for a file or folder that takes its name in the cache once it is written, and disappears on errors.

    Of two processes that make the same at once the first one's folder stays, or the last one's file.

    Raises:
        UserError: if the cache cannot be written.
    """
    with cache_fault(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as folder:
            made = Path(folder, target.name)
            yield made
            try:
                made.replace(target)
            except OSError:
                if not target.is_dir():
                    raise


# --- downloads --------------------------------------------------------------------------------------------------------


def downloaded(url: str, md5: str) -> Path:
    """Return the path of a cached download, fetched once and checked before it takes its name.

    Raises:
        UserError: if it cannot be fetched or has another hash.
    """
    name = PurePosixPath(url).name
    file = cache_dir() / "downloads" / name
    if file.is_file():
        return file
    check_download(name)
    from torchvision.datasets.utils import download_url

    remedy = f"check the network, or get {name} elsewhere, and set data.path to where it is unpacked"
    with new_in_cache(file) as temporary, foreign_fault("could not be downloaded", url, remedy=remedy):
        download_url(url, str(temporary.parent), name, md5)
    return file


def unpacked(archive: Path, sha256: str) -> Path:
    """Return a cache folder with the content of a downloaded tar, which is unpacked once."""
    folder = cache_dir() / "unpacked" / sha256[:32]
    if not folder.is_dir():
        with new_in_cache(folder) as temporary, tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
    return folder


def fetched_shards(address: str) -> Path:
    """Return a pattern of the shards of an address such as s3://bucket/*.tar; each is fetched once, to the cache.

    Raises:
        UserError: if a package is missing, nothing is there, or it can't be fetched.
    """
    folder = cache_dir() / "shards" / hashlib.sha256(address.encode()).hexdigest()[:32]
    if not (folder / _FETCHED).is_file():
        check_download(address)
        scheme = address.partition(":")[0]
        if scheme in _PACKAGE_OF:
            require_extra("remote", packages=[_PACKAGE_OF[scheme]], file=address)
        root = f"{_place(_MAGIC.split(address)[0].rpartition('/')[0])}/"
        remedy = "check address, network and credentials; what is here stays"
        fault = partial(foreign_fault, "can't be fetched", address, remedy=remedy, field="data.path")
        with fault():
            from fsspec.core import url_to_fs

            found = [url_to_fs(pattern) for pattern in expanded_braces(address)]
            listed = [(fs, one) for fs, place in found for one in (fs.glob(place) if "*" in place else [place])]
        if not listed:
            raise UserError("matches no shard; correct it", file=address, field="data.path")
        for fs, one in listed:
            name = PurePosixPath(_place(fs.unstrip_protocol(one)).removeprefix(root).partition("?")[0])
            if name.is_absolute() or ".." in name.parts or name.suffix != ".tar":
                raise UserError("is not the name of a .tar below it", file=one)
            if not (folder / name).is_file():
                with new_in_cache(folder / name) as temporary, fault():
                    fs.get_file(one, str(temporary))
        with cache_fault(folder):
            write_atomically(folder / _FETCHED, b"")
    return folder / "**" / "*.tar"


def _place(address: str) -> str:
    return re.sub("^[a-z0-9]+:/+", "", address)
