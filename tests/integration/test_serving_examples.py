"""The examples that serve a model answer what `predict` says, over HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.exceptions import HTTPException
from tiny_models import CARD

from peft_vit.base.errors import UserError
from peft_vit.deploy import Classifier, predict_images

EXAMPLES = Path(__file__).parents[2] / "examples"
WEIGHTS = np.random.default_rng(0).normal(size=(3, len(CARD.class_names))).astype(np.float32)


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def classifier() -> Classifier:
    return Classifier(lambda images: images.mean((2, 3)) @ WEIGHTS, CARD)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)).save(file)
    return file


def test_an_image_is_answered_as_predict_does(classifier: Classifier, photo: Path) -> None:
    from serve import answer

    (expected,) = predict_images(classifier, [photo], top=3)
    said = json.loads(json.dumps(answer(classifier, photo.read_bytes())))
    assert (said["class"], said["probability"]) == (expected.class_name, expected.probability)
    assert said["top"] == dict(expected.top)
    with pytest.raises(UserError):
        answer(classifier, b"no image")


@pytest.fixture
def predict(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return what the service does with the parts of a body, without FastAPI, which no extra brings."""
    from serve import app

    at: dict[str, Callable[[Any], Any]] = {}
    service = SimpleNamespace(post=lambda path: partial(at.__setitem__, path))
    fastapi = SimpleNamespace(FastAPI=lambda title: service, HTTPException=HTTPException, Request=object)
    monkeypatch.setitem(sys.modules, "fastapi", fastapi)
    monkeypatch.setenv("MODEL", "model.onnx")
    monkeypatch.setattr("peft_vit.load", lambda path: SimpleNamespace(classifier=classifier))
    app()

    def called(parts: Iterator[bytes], content_type: str = "image/png") -> Any:
        async def stream() -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        return asyncio.run(at["/predict"](SimpleNamespace(stream=stream, headers={"content-type": content_type})))

    return called


def test_no_more_is_read_of_a_body_than_an_image_may_have(predict: Callable[..., Any]) -> None:
    from serve import _LARGEST

    parts, part = iter(range(100)), b"\0" * (_LARGEST // 10)
    with pytest.raises(HTTPException) as caught:
        predict(part for _ in parts)
    assert caught.value.status_code == 413
    assert len(list(parts)) == 89  # the eleventh was too much


def test_a_model_computes_beside_the_thread_that_reads_requests(
    predict: Callable[..., Any], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import serve

    monkeypatch.setattr(serve, "answer", lambda *_: {"thread": threading.get_ident()})
    assert predict(iter([photo.read_bytes()]))["thread"] != threading.get_ident()


def test_the_service_answers(predict: Callable[..., Any], classifier: Classifier, photo: Path) -> None:
    from serve import answer

    assert predict(iter([photo.read_bytes()])) == answer(classifier, photo.read_bytes())
    with pytest.raises(HTTPException) as caught:
        predict(iter([b"no image"]))
    assert caught.value.status_code == 422


def test_a_form_with_a_file_is_answered_as_its_image(
    predict: Callable[..., Any], classifier: Classifier, photo: Path
) -> None:
    from serve import answer

    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="p.png"\r\nContent-Type: image/png\r\n\r\n'
    field = b'--x\r\nContent-Disposition: form-data; name="note"\r\n\r\nmine\r\n'
    form = field + head + photo.read_bytes() + b"\r\n--x--\r\n"
    assert predict(iter([form]), "multipart/form-data; boundary=x") == answer(classifier, photo.read_bytes())
    with pytest.raises(HTTPException) as caught:
        predict(iter([field + b"--x--\r\n"]), "multipart/form-data; boundary=x")
    assert caught.value.status_code == 422


@pytest.fixture
def server(classifier: Classifier) -> Iterator[str]:
    """Yield the address of what answers as a model server does, by KServe's protocol."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v2/models/mine/infer"
            (sent,) = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
            assert (sent["name"], sent["datatype"]) == ("images", "FP32")
            logits = classifier.logits(np.array(sent["data"], np.float32).reshape(sent["shape"]))
            output = {"name": "logits", "datatype": "FP32", "shape": logits.shape, "data": logits.ravel().tolist()}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"outputs": [output]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_a_model_server_is_asked_as_the_file_says(
    server: str,
    classifier: Classifier,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import model_server

    def no_product(_: np.ndarray) -> np.ndarray:
        raise AssertionError("the server computes")

    monkeypatch.setattr(model_server, "open_exported", lambda _: replace(classifier, logits=no_product))
    model_server.main(server, "mine", "model.xml", str(photo))
    (expected,) = predict_images(classifier, [photo])
    assert capsys.readouterr().out == f"{photo}\t{expected.class_name}\t{expected.probability:.4f}\n"
