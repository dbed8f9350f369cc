"""Labelled images: data sets, splits, decode-once cache, batches, and a test split that is read once."""

from peft_vit.data.files import IMAGE_SUFFIXES, existing
from peft_vit.data.folders import Images, find_images, index_inspected
from peft_vit.data.images import HoldoutImages, LabelledImages, check_augmentation, mixed, normalised
from peft_vit.data.index import ImageIndex, ImagesFile
from peft_vit.data.inspect import Inspection, PixelStore, image_warnings, images_file, inspect_images
from peft_vit.data.load import Data, load_data, open_index, smoke_config, thumbnails, thumbnails_of
from peft_vit.data.pixels import decode_image, to_pixels
from peft_vit.data.splits import Splits, class_gaps, deal_folds, make_splits, stratified_draw
