"""What differs between tasks stands on them: no other file of the package asks which one it has."""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

import peft_vit
from peft_vit.core.config import TaskName
from peft_vit.core.tasks import TASKS
from peft_vit.deploy.presentation import PRESENTED

pytestmark = pytest.mark.part("trainer")
PACKAGE = Path(peft_vit.__file__).parent
OBJECTS = {name.upper() for name in TASKS}
# What configurations may say, and a page that asks for labels without torch, which tasks need.
LABELS = {
    "cli/label_command.py",
    "label/corrections.py",
    "label/exchange.py",
    "label/features.py",
    "label/labels.py",
    "label/session.py",
    "label/training.py",
    "label/page/page.js",
}
NAMES_THEM = {"core/config/training.py", *LABELS - {"label/page/page.js"}}
PASSED_ON = ("CLASSIFICATION",)  # the task of a value that says no other; never asked for


def branches(source: str) -> list[str]:
    """Return where Python asks which task it has: by name, by object, by the shape of labels, or by type."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in TASKS:
            found.append(f"{node.lineno}: {node.value!r}")
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in OBJECTS - {*PASSED_ON}:
                found.append(f"{node.lineno}: {name}")
        if isinstance(node, ast.Attribute) and node.attr == "ndim" and "labels" in ast.unparse(node.value):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        compared = [*ast.walk(node)] if isinstance(node, ast.Compare | ast.MatchValue) else []
        for part in compared:
            text = ast.unparse(part) if isinstance(part, ast.Attribute | ast.Name) else ""
            if re.search(r"(^|\.)task(_name)?\.name$", text) or text in PASSED_ON:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        is_instance = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
        if is_instance and re.search(r"\b(Decision|Calibrated)\b|labels", ast.unparse(node)):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_file_outside_of_tasks_asks_which_one_it_has() -> None:
    own = {*(PACKAGE / "core/tasks").iterdir(), PACKAGE / "deploy/presentation.py"}
    files = [file for file in PACKAGE.rglob("*.py") if file not in own]
    found = {file.relative_to(PACKAGE).as_posix(): branches(file.read_text(encoding="utf-8")) for file in files}
    assert len(found) > 190
    assert {name for name, places in found.items() if places} == NAMES_THEM
    pages = [file for file in PACKAGE.rglob("*") if file.suffix in (".js", ".j2", ".html", ".css")]
    assert len(pages) >= 5
    asking = [file for file in pages if re.search("|".join(rf"""["']{name}""" for name in TASKS), file.read_text())]
    assert {file.relative_to(PACKAGE).as_posix() for file in asking} <= LABELS


@pytest.mark.parametrize(
    "source",
    [
        'if spec.task == "regression": pass',
        "if index.task.name in names: pass",
        "if task is CLASSIFICATION: pass",
        "from peft_vit import tasks; x = tasks.MULTILABEL",
        "if index.labels.ndim > 1: pass",
        "found = isinstance(meaning, Decision)",
    ],
)
def test_such_a_branch_is_found(source) -> None:
    assert branches(source)


def test_a_task_is_named_where_configurations_may_say_it() -> None:
    assert set(get_args(TaskName)) == set(TASKS)
    assert all(task.name == name for name, task in TASKS.items())
    assert {name: shown.task for name, shown in PRESENTED.items()} == TASKS
    assert [name for name, task in TASKS.items() if task.one_class] == ["classification"]
    assert {task.column for task in TASKS.values()} == {"classes", "lists", "numbers"}
