"""Strict YAML to frozen models: the only place where configuration is read and checked.

What needs only the file is checked here. What needs the model's sites or the data set's size (a rank above a
width, a group that does not divide the inputs, a schedule longer than the run) is checked by
``studies.plan``, before any expensive work, with the same kind of error.
"""

from peft_vit.config.from_yaml import load_study, named_as_typed, study_from_mapping
from peft_vit.config.methods import (
    METHOD_KINDS,
    METRICS,
    ORDERED_RULES,
    PROBE_L2,
    RULE_OF_A_BUDGET,
    SECTIONS,
    AdaLoraConfig,
    AdaptiveBitsConfig,
    BudgetUnit,
    LoraConfig,
    Metric,
    PeftAdaLoraConfig,
    PeftConfig,
    PeftLoraConfig,
    QaLoraConfig,
    Rounding,
    StartingRanksConfig,
    Strategy,
)
from peft_vit.config.registries import (
    BITS_OF_TYPE,
    BUNDLE_FILE,
    CARD_FILE,
    DATASETS,
    EXPORTS,
    NUMBER_FORMATS,
    PEFT_FILE,
    TYPE_OF_BITS,
    DatasetInfo,
    ExportFormat,
    QuantizationType,
    exported_bytes,
    exported_format,
    format_of_name,
    is_bundle,
    licence_of,
)
from peft_vit.config.study import (
    CHECKPOINT_EVERY_S,
    DEFAULT_MODEL,
    FEWEST_PAIRS,
    IMAGE_SIZES,
    PROBE_READS,
    SEEDS,
    BackboneConfig,
    DataConfig,
    DatasetName,
    Device,
    ExperimentConfig,
    Interpolation,
    Library,
    MeasuresConfig,
    MethodName,
    Name,
    Precision,
    PrecisionSetting,
    StoppingConfig,
    StudyConfig,
    WeightsSource,
    named_backbone,
)
from peft_vit.config.training import (
    AUGMENTATION_OF_FLIPS,
    LABEL_SMOOTHING,
    ActivationCheckpointing,
    Augmentation,
    ClassWeights,
    ColorJitter,
    Compute,
    ComputeSetting,
    Cutmix,
    Flip,
    Flips,
    MetricName,
    MetricSetting,
    Mixup,
    RandAugment,
    RandomResizedCrop,
    Rotate90,
    TaskName,
    TrainingConfig,
    micro_batch_fault,
)
from peft_vit.config.units import Number, Size, Time, WrittenSize, bytes_of, several
from peft_vit.settings import MATRICES, SITE_MATRICES, AdapterConfig, Frozen, Kind, OnlyWith, Settings, SiteMatrix
