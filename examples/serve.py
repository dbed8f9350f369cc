"""A web service for a model: an image goes in, its classes come out as JSON.

    pip install fastapi uvicorn
    MODEL=peft-vit-tune/model/model.onnx uvicorn --factory --app-dir examples serve:app
    curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict
    curl --form file=@photo.jpg http://127.0.0.1:8000/predict

The model is read once. With an ONNX or OpenVINO file no PyTorch is loaded.
"""

from __future__ import annotations

import asyncio
import os
from email import message_from_bytes
from pathlib import Path
from typing import Any

import peft_vit
from peft_vit.base.errors import UserError
from peft_vit.deploy import Classifier, ImageFile, predict_files

_LARGEST = 20_000_000  # bytes of an image


def answer(classifier: Classifier, content: bytes) -> dict[str, Any]:
    """Return what a model says of the bytes of an image file; raises UserError if they are no image."""
    (said,) = predict_files(classifier, [ImageFile(Path("image"), lambda: content)], top=3)
    if isinstance(said, UserError):
        raise said
    return {"class": said.class_name, "probability": said.probability, "top": dict(said.top), "unlike": said.unlike}


def image_of(content: bytes, content_type: str) -> bytes:
    """Return the first file of a form (multipart/form-data); a body of another type is the image itself."""
    if not content_type.startswith("multipart/form-data"):
        return content
    form = message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + content)
    files = [part.get_payload(decode=True) for part in form.walk() if part.get_filename()]
    return bytes(files[0]) if files else b""


def app() -> Any:
    """Return the service for the model that the environment variable MODEL names."""
    from fastapi import FastAPI, HTTPException, Request

    classifier = peft_vit.load(os.environ["MODEL"]).classifier
    service, turn = FastAPI(title="peft-vit"), asyncio.Lock()

    async def predict(request: Any) -> dict[str, Any]:
        content = bytearray()
        async for part in request.stream():  # and no further than that, whatever the header says
            content += part
            if len(content) > _LARGEST:
                raise HTTPException(413, f"send at most {_LARGEST} bytes")
        image = image_of(bytes(content), request.headers.get("content-type", ""))
        try:
            async with turn:  # OpenVINO answers one at a time; in a thread, or the next request would not even be read
                return await asyncio.to_thread(answer, classifier, image)
        except UserError as error:
            raise HTTPException(422, str(error)) from None

    predict.__annotations__["request"] = Request
    service.post("/predict")(predict)
    return service
