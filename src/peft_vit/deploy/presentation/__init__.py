"""What people are shown of a task: what a model says of images, in words, tables and a browser, and on a page.

Nothing here needs torch. To add a task: a module here, and its line in PRESENTED.
"""

from peft_vit.deploy.presentation.of_classes import Classes
from peft_vit.deploy.presentation.of_labels import ManyLabels
from peft_vit.deploy.presentation.of_numbers import Numbers
from peft_vit.deploy.presentation.presentation import (
    Counts,
    Errors,
    Explanation,
    ImageSelection,
    LabelledOutputs,
    Prediction,
    Presentation,
)

PRESENTED: dict[str, Presentation] = {kind.task.name: kind for kind in (Classes(), Numbers(), ManyLabels())}
