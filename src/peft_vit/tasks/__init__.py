"""What is learned from images: a task is one object, and nothing else branches on which one it is."""

from peft_vit.records import RunSpec
from peft_vit.tasks.classification import CLASSIFICATION
from peft_vit.tasks.multilabel import MULTILABEL
from peft_vit.tasks.regression import REGRESSION
from peft_vit.tasks.task import DecidingMetric, Labels, Task

# Of those that recognize a table the last one is taken: columns of 0 and 1 are numbers, too.
TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, REGRESSION, MULTILABEL)}


def metric_of(spec: RunSpec) -> DecidingMetric:
    """Return what decides in a run that is planned: which step, which penalty of the probe, and what is shown first."""
    return TASKS[spec.task].metric(spec.experiment.training.metric)
