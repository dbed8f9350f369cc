"""A data set from a hub: the library's own client against a server that answers as the hub does, as far as it is asked.

The real hub can't be reached from where this package is tested.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from sample_sets import sample_path

COMMIT = "a" * 40
API, FILES = "/api/datasets/someone/pets", "/datasets/someone/pets/resolve/"


class Hub(ThreadingHTTPServer):
    """Serves a folder as the data set someone/pets, and keeps what was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        self.asked: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        self.server.asked.append(f"{self.command} {self.path}")

    def do_GET(self) -> None:
        path, files = unquote(self.path.split("?")[0]), self.server.files
        if path.startswith(FILES):
            file = files.get(path.removeprefix(FILES).partition("/")[2])
            if file is None:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                self._send(200, file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(file)}"'})
        elif path.startswith(f"{API}/tree/{COMMIT}"):
            self._tree(path.removeprefix(f"{API}/tree/{COMMIT}").lstrip("/"))
        elif path in (API, f"{API}/revision/{COMMIT}"):
            self._json({"id": "someone/pets", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _tree(self, folder: str) -> None:
        """Answer with files and folders in a folder, with `recursive=true` those below too."""
        below = {name: file for name, file in self.server.files.items() if Path(folder) in Path(name).parents}
        folders = {above.as_posix() for name in below for above in Path(name).parents} - {".", folder}
        files: dict[str, dict[str, object]] = {
            name: {"type": "directory", "oid": "0" * 40, "size": 0}
            for name in sorted(folders)
            if Path(folder) in Path(name).parents
        }
        files |= {name: {"type": "file", "oid": _oid(f), "size": f.stat().st_size} for name, f in below.items()}
        deep = "recursive=true" in self.path
        rows = [row | {"path": name} for name, row in files.items() if deep or Path(name).parent == Path(folder)]
        if rows:
            self._json(rows)
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(params=["hf", "image-folder"])
def hub(request: pytest.FixtureRequest, cache: str) -> Iterator[Hub]:
    with Hub(sample_path(request.param)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


CODE = """
import json, sys
from peft_vit.core.config import DataConfig
from peft_vit.data import open_index
index = open_index(DataConfig(dataset="hf", path=sys.argv[1], image_size=14, validation_images=4))
pixels = [list(index.read(i).size) for i in range(len(index.labels))]
assert len(set(index.names)) == len(index.names) and index.names[0] == "train[0]"
print(json.dumps([len(index.labels), index.class_names, int(index.official_test.sum()), index.sha256, pixels]))
"""


@pytest.mark.slow
def test_a_set_comes_from_the_hub_once(hub: Hub, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "PEFT_VIT_CACHE": str(tmp_path / "c")}

    def opened(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CODE, name]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)

    first = opened("someone/pets")
    assert first.returncode == 0, first.stderr
    count, names, test, _, sizes = json.loads(first.stdout.splitlines()[-1])
    assert (count, names, test, sizes) == (42, ["class_0", "class_1", "class_2"], 12, [[40, 40]] * 42)
    assert any("GET" in line and "train" in line for line in hub.asked)
    hub.asked.clear()
    assert opened("someone/pets").stdout == first.stdout
    assert [line for line in hub.asked if "someone" in line] == []
    unknown = opened("someone/none")
    assert "UserError: someone/none: data.path: is not here, and can't be fetched from the hub" in unknown.stderr
    assert "doesn't exist on the Hub" in unknown.stderr
