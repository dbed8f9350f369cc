"""Labelled images: registry, splits, decode-once cache, batches, and a sealed test split."""

from peft_vit.data.augmentation import check_augmentation, mixed
from peft_vit.data.decoding import decode_image
from peft_vit.data.duplicates import image_warnings
from peft_vit.data.files import IMAGE_SUFFIXES
from peft_vit.data.images import LabelledImages, SealedImages, normalised
from peft_vit.data.index import ImageIndex
from peft_vit.data.loading import Data, load_data, smoke_config, thumbnails, thumbnails_of
from peft_vit.data.look import images_file, look_at
from peft_vit.data.pixels import to_pixels
from peft_vit.data.registry import open_index
from peft_vit.data.splits import Splits, class_gaps, deal_folds, make_splits, stratified_draw
