"""Labelled images: registry, splits, decode-once cache, batches, and a sealed test split."""

from peft_vit.data.images import LabelledImages, SealedImages
from peft_vit.data.index import ImageIndex
from peft_vit.data.loading import Data, load_data, smoke_config
from peft_vit.data.registry import DATASETS, DatasetInfo, open_index
from peft_vit.data.splits import Splits, make_splits

__all__ = [
    "DATASETS",
    "Data",
    "DatasetInfo",
    "ImageIndex",
    "LabelledImages",
    "SealedImages",
    "Splits",
    "load_data",
    "make_splits",
    "open_index",
    "smoke_config",
]
