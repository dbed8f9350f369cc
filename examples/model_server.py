r"""Ask a model that OpenVINO Model Server serves; images are prepared here, as in training.

    mkdir -p models/mine/1 && peft-vit export peft-vit-runs/latest --output models/mine/1/model.xml
    docker run -p 8000:8000 -v $PWD/models:/models openvino/model_server \
        --model_name mine --model_path /models/mine --rest_port 8000
    python examples/model_server.py http://127.0.0.1:8000 mine models/mine/1/model.xml photos/*.jpg

The server speaks the KServe protocol, version 2. The file on this side holds size, classes and temperature.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.errors import UserError
from peft_vit.deploy import Classifier, open_exported, predict_files


def served(url: str, name: str, file: Path) -> Classifier:
    """Return a model that computes on a server, with what its file says of images and classes."""

    def logits(images: NDArray[np.float32]) -> NDArray[np.float32]:  # (B, 3, S, S) -> (B, classes)
        sent = {"name": "images", "shape": images.shape, "datatype": "FP32", "data": images.ravel().tolist()}
        body = json.dumps({"inputs": [sent], "outputs": [{"name": "logits"}]}).encode()
        request = Request(f"{url}/v2/models/{name}/infer", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as reply:
            (output,) = json.load(reply)["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    return replace(open_exported(file), logits=logits, with_distances=None)


def main(url: str, name: str, file: str, *photos: str) -> None:
    """Print a class and its probability for each photo."""
    for said in predict_files(served(url, name, Path(file)), map(Path, photos)):
        print(said if isinstance(said, UserError) else f"{said.file}\t{said.class_name}\t{said.probability:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
