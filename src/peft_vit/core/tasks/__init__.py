"""What is learned from images: a task is one object, and nothing else branches on which one it is."""

from peft_vit.core.records import RunRecord, RunSpec
from peft_vit.core.tasks.classification import CLASSIFICATION
from peft_vit.core.tasks.metric import GAIN_SD, DecidingMetric, Labels, expected_gain
from peft_vit.core.tasks.multilabel import MULTILABEL
from peft_vit.core.tasks.regression import REGRESSION
from peft_vit.core.tasks.scores import OF_FOLDS, Scores, thresholds_of
from peft_vit.core.tasks.task import Column, Meaning, Task, meaning_fields, rows_of

# Of those that recognize a table the last one is taken: columns of 0 and 1 are numbers, too.
TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, REGRESSION, MULTILABEL)}


def metric_of(spec: RunSpec) -> DecidingMetric:
    """Return the deciding metric of a planned run, which chooses step and penalty and is shown first."""
    return TASKS[spec.task].metric(spec.experiment.training.metric)


def scores_of(record: RunRecord) -> Scores:
    """Return the scores by which studies compare a run; errors are in standard deviations of its test labels."""
    task = TASKS[record.spec.task].restored(record.decision)
    metric = task.metrics[task.compared_by] if task.compared_by else metric_of(record.spec)
    labels = rows_of(record.predictions.labels) if metric.has_unit and record.predictions is not None else None
    return Scores(task, metric, 1.0 if labels is None or labels.shape[1] > 1 else float(labels.std()))
