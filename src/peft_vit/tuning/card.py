"""The card of a tuned model, in the form of the Hugging Face hub's model cards."""

from __future__ import annotations

from collections.abc import Callable

from peft_vit.report.document import Drawing, StudyDocument
from peft_vit.report.markdown import block_text, escaped, summary_parts
from peft_vit.tuning.blocks import TuningSummary


def write_card(
    summary: TuningSummary, document: StudyDocument, figure_path: Callable[[StudyDocument, Drawing], str]
) -> str:
    """Return the text of card.md: metadata as YAML, how to use the model, and what the page says, without pictures.

    Args:
        summary: everything that is told.
        document: the page.
        figure_path: where a figure's PNG lies, relative to the card.
    """
    parts = [f"---\n{_metadata(summary)}\n---", f"# {escaped(document.label)}", *summary_parts(document, figure_path)]
    parts += ["## How to use it", _use(summary)]
    for title in document.order:
        if document.sections[title]:
            parts.append(f"## {title}")
            parts += [block_text(block, document, figure_path) for block in document.sections[title]]
    return "\n\n".join(parts) + "\n"


def _metadata(summary: TuningSummary) -> str:
    """Return the hub's fields. No licence is named: that of the weights and that of the images both bind."""
    from huggingface_hub import EvalResult, ModelCardData

    name = summary.choice.request.images.name or "images"
    values = {
        "accuracy": summary.sealed.accuracy.estimate,
        "balanced_accuracy": summary.sealed.balanced_accuracy.estimate,
    }
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder",
            dataset_name=name,
            dataset_split="test",
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in values.items()
    ]
    data = ModelCardData(
        library_name="openvino" if summary.exports.model.suffix == ".xml" else "onnx",
        pipeline_tag="image-classification",
        tags=["peft-vit", summary.choice.model, summary.chosen.spec.experiment.method],
        metrics=list(values),
        model_name=f"{summary.choice.chosen} for {name}",
        eval_results=results,
    )
    return str(data.to_yaml()).strip()


def _use(summary: TuningSummary) -> str:
    model = f"model/{summary.exports.model.name}"
    sets = " --coverage 0.9" if summary.calibrated.coverages else ""
    return f"""```
peft-vit predict {model} IMAGES...{sets}
peft-vit run config.yaml --output again     # trains it again
```

```python
from pathlib import Path
from peft_vit.deployment import open_exported, predict_files

for found in predict_files(open_exported(Path("{model}")), [Path("photo.jpg")]):
    print(found)
```

The file takes `images` (B, 3, S, S) and gives `logits`; how pixels become these, the classes and the temperature
stand in its metadata `peft_vit_model`. `model/adapter.safetensors` holds what was trained, without the backbone."""
