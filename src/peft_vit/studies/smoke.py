"""Compress any study into seconds: random weights, synthetic files of the right format, a handful of steps."""

from __future__ import annotations

from peft_vit.config import BackboneConfig, ExperimentConfig, LoraConfig, QaLoraConfig, StudyConfig
from peft_vit.data import smoke_config
from peft_vit.methods import shorten

_EPOCHS = 2
_STEPS_PER_EPOCH = 4
_ENDLESS = 10**9  # steps; beside them each phase of a schedule that a study gives in steps is as short as it can be
_CALIBRATION_IMAGES = 16  # no smoke study has fewer to train on


def smoke_study(study: StudyConfig, patch_size: int) -> StudyConfig:
    """Return the same study, small enough for a test. Its records say that they are smoke records.

    Every experiment keeps its method and its settings; only schedules, images, batches, seeds and threads shrink.
    Where bf16 is asked for the machine decides, so that no smoke study waits for emulated products.
    """
    data = smoke_config(study.data, patch_size)
    assert data.train_images is not None
    batch_size = -(-data.train_images // _STEPS_PER_EPOCH)
    return study.model_copy(
        update={
            "seeds": study.seeds[:1],
            "backbone": BackboneConfig(library=study.backbone.library, model=study.backbone.model, weights="random"),
            "threads": 1,  # products this small only wait for a second thread, for minutes if the machine is busy
            "precision": "auto" if study.precision == "bf16" else study.precision,
            "data": data,
            "experiments": tuple(_compress(experiment, batch_size) for experiment in study.experiments),
            "stopping": None,  # one seed
        }
    )


def _compress(experiment: ExperimentConfig, batch_size: int) -> ExperimentConfig:
    few_steps = {"epochs": _EPOCHS, "steps": None, "validate_every": None, "patience": None, "warmup_share": None}
    training = experiment.training.with_batch_size(batch_size)
    if not experiment.is_probe:
        training = training.model_copy(update=few_steps)
    short = shorten(experiment, _ENDLESS, _EPOCHS * _STEPS_PER_EPOCH)
    update: dict[str, object] = {"training": training}
    qa_lora = short.section(QaLoraConfig)
    if qa_lora is not None and qa_lora.adaptive_bits is not None:
        few = {"calibration_images": min(qa_lora.adaptive_bits.calibration_images, _CALIBRATION_IMAGES)}
        qa_lora = qa_lora.model_copy(update={"adaptive_bits": qa_lora.adaptive_bits.model_copy(update=few)})
        update["qa_lora"] = qa_lora
    if qa_lora is not None and qa_lora.rounding == "gptq":
        update["qa_lora"] = qa_lora.model_copy(update={"calibration_images": _CALIBRATION_IMAGES})
    lora = short.section(LoraConfig)
    if lora is not None and lora.ranks is not None and lora.ranks.reads_images:
        few = {"calibration_images": min(lora.ranks.calibration_images, _CALIBRATION_IMAGES)}
        update["lora"] = lora.model_copy(update={"ranks": lora.ranks.model_copy(update=few)})
    return short.model_copy(update=update)
