"""Strict YAML to frozen models: the only place where configuration is read and checked.

What needs only the file is checked here. What needs the model's sites or the data set's size (a rank above a
width, a group that does not divide the inputs, a schedule longer than the run) is checked by
``studies.plan``, before any expensive work, with the same kind of error.
"""

from peft_vit.config.adalora import AdaLoraConfig, BudgetUnit, Strategy
from peft_vit.config.augmentation import (
    AUGMENTATION_OF_FLIPS,
    Augmentation,
    ColorJitter,
    Cutmix,
    Flip,
    Mixup,
    RandAugment,
    RandomResizedCrop,
    Rotate90,
)
from peft_vit.config.datasets import DATASETS, DatasetInfo
from peft_vit.config.importance import METRICS, Metric
from peft_vit.config.loading import load_study, study_from_mapping
from peft_vit.config.lora import ORDERED_RULES, RULE_OF_A_BUDGET, LoraConfig, StartingRanksConfig
from peft_vit.config.methods import METHOD_KINDS, PROBE_L2, SECTIONS
from peft_vit.config.named_backbone import DEFAULT_MODEL, named_backbone
from peft_vit.config.peft import PeftAdaLoraConfig, PeftConfig, PeftLoraConfig
from peft_vit.config.qa_lora import BITS_OF_TYPE, AdaptiveBitsConfig, QaLoraConfig, QuantizationType
from peft_vit.config.stopping import StoppingConfig
from peft_vit.config.study import (
    IMAGE_SIZES,
    PROBE_READS,
    SEEDS,
    AskedPrecision,
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
    StudyConfig,
    WeightsSource,
)
from peft_vit.config.training import ActivationCheckpointing, TrainingConfig, bytes_of, micro_batch_fault, parse_bytes
from peft_vit.settings import MATRICES, SITE_MATRICES, AdapterConfig, Frozen, Kind, SiteMatrix
