"""A training process holds no library that it does not use: each of these would take up to 100 MB of its memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from written_runs import tiny_study

pytestmark = pytest.mark.usefixtures("cache")

HEAVY = (
    "bitsandbytes datasets jinja2 matplotlib onnx onnxruntime openvino pandas peft pyarrow rich scipy.optimize "
    "scipy.sparse scipy.special scipy.stats sklearn statsmodels tensorboard transformers typer"
)
SCRIPT = """
import json
import sys
from pathlib import Path

def loaded(stage):
    print(json.dumps({stage: [name for name in sys.argv[2].split() if name in sys.modules]}))

from peft_vit.config import study_from_mapping
from peft_vit.runs.execute import run_one
from peft_vit.studies.plan import plan_study

loaded("imports")
mapping, file = json.loads(sys.argv[1]), Path("tiny.yaml")
for planned in plan_study(study_from_mapping(mapping, file=file), Path("out"), file=file).runs:
    record = run_one(planned.spec).record
    assert record.status == "done", record.traceback
    loaded(planned.spec.experiment.name)
"""


def test_a_run_loads_only_what_it_uses(images: Path, tmp_path: Path) -> None:
    mapping = tiny_study("nf4", "linear", images=images)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(mapping), HEAVY],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    loaded = {stage: names for line in done.stdout.splitlines() for stage, names in json.loads(line).items()}
    probe = loaded.pop("linear")
    assert loaded == {"imports": [], "nf4": []}
    assert "sklearn" in probe  # which a linear probe is fitted by, so the names are those that Python knows
