"""Labelled images: data sets, splits, decode-once cache, batches, and a test split that is read once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft_vit.data.files import IMAGE_SUFFIXES, existing
from peft_vit.data.index import ImageIndex, ImagesFile
from peft_vit.data.pixels import decode_image, to_pixels
from peft_vit.data.sources.folders import Images, find_images, index_inspected

if TYPE_CHECKING:
    from peft_vit.data.inspection.decoding import PixelStore
    from peft_vit.data.inspection.duplicates import image_warnings
    from peft_vit.data.inspection.holdout import images_file
    from peft_vit.data.inspection.inspect import Inspection, inspect_images
    from peft_vit.data.load import images_of, load_data, open_index, smoke_config, thumbnails_of
    from peft_vit.data.splits import Splits, class_gaps, make_splits

_WITH_TORCH = {
    "PixelStore": "inspection.decoding",
    "image_warnings": "inspection.duplicates",
    "images_file": "inspection.holdout",
    "Inspection": "inspection.inspect",
    "inspect_images": "inspection.inspect",
    **dict.fromkeys(("images_of", "load_data", "open_index", "smoke_config", "thumbnails_of"), "load"),
    **dict.fromkeys(("Splits", "class_gaps", "make_splits"), "splits"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: predicting from a file for another runtime needs no torch."""
    if name in _WITH_TORCH:
        return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
