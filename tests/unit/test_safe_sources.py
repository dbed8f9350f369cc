"""No source of this package runs what a file holds: each call that could is found and refused, wherever it is added."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(file for folder in ("src", "experiments", "benchmarks") for file in (ROOT / folder).rglob("*.py"))

# Modules that unpickle or evaluate; and XML, whose entities are bombs.
MODULES = {
    "cPickle",
    "cloudpickle",
    "code",
    "dbm",
    "dill",
    "imp",
    "joblib",
    "jsonpickle",
    "marshal",
    "pickle",
    "pickletools",
    "runpy",
    "shelve",
    "xml",
}
BUILTINS = {"__import__", "compile", "eval", "exec"}
# Calls that are refused however they are made.
CALLS = {
    "onnx.load",
    "onnx.load_model",
    "os.popen",
    "os.system",
    "pandas.read_hdf",
    "pandas.read_pickle",
    "pd.read_pickle",
    "shutil.unpack_archive",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.hub.load",
    "torch.jit.load",
    "torch.export.load",
    "torch.package.PackageImporter",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.load",
    "yaml.load_all",
    "yaml.safe_load",
    "yaml.safe_load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
}
METHODS = {"extractall", "read_pickle"}  # on whatever object
# Calls that need an argument to be safe.
NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "Image.open": ("formats", None),  # None: any value
}


def faults(source: str) -> Iterator[str]:
    """Yield what a source does that no source may do, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            renamed = {f"{node.module}.{alias.name}" for alias in node.names} & {*CALLS, *NEEDED}
            yield from (f"{node.lineno}: imports {name} by its bare name" for name in sorted(renamed))
        else:
            modules = []
            if isinstance(node, ast.Call):
                yield from (f"{node.lineno}: {fault}" for fault in call_faults(node))
        yield from (f"{node.lineno}: imports {name}" for name in modules if name.partition(".")[0] in MODULES)


def call_faults(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in BUILTINS or name in CALLS or name.rpartition(".")[2] in METHODS:
        yield f"calls {name}"
    if name in NEEDED:
        keyword, value = NEEDED[name]
        given = keywords.get(keyword)
        if given is None or (value is not None and ast.unparse(given) != repr(value)):
            yield f"calls {name} without {keyword}={'...' if value is None else value}"
    if "shell" in keywords and ast.unparse(keywords["shell"]) != "False":
        yield f"calls {name} with a shell"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    assert list(faults(file.read_text(encoding="utf-8"))) == []


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 100
    assert ROOT / "src" / "peft_vit" / "backbones" / "weights.py" in SOURCES


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import os, joblib",
        "import xml.etree.ElementTree as tree",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "from torch import load",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text, Loader=L)",
        "yaml.safe_load(text)",
        "from yaml import safe_load",
        "eval(text)",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "tar.extractall()",
        "shutil.unpack_archive(file)",
        "onnx.load(file)",
        "Image.open(file)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "torch.jit.load(file)",
        "frame = pandas.read_pickle(x)",
    ],
)
def test_each_way_would_be_found(line: str) -> None:
    assert len(list(faults(line))) == 1


def test_sound_calls_are_left_alone() -> None:
    sound = """
import re, zipfile, yaml
torch.load(file, map_location="cpu", weights_only=True)
np.load(file, mmap_mode="r", allow_pickle=False)
Image.open(stream, formats=("PNG",))
re.compile(text)
model.eval()
onnx.load_from_string(content)
yaml.safe_dump(data)
subprocess.run(["git"], shell=False)
"""
    assert list(faults(sound)) == []
