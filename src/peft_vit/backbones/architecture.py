"""What a model without weights is built from: a name in timm, or a configuration of transformers."""

from __future__ import annotations

from dataclasses import dataclass

from peft_vit.config import Library


@dataclass(frozen=True)
class Architecture:
    """Which model, in whose library.

    Attributes:
        library: timm or transformers.
        name: timm's, or of transformers the hub's name, a folder, or a type of models; for people then.
        config: of transformers, as JSON, see `transformers_models`; timm's models follow from their name.
    """

    library: Library
    name: str
    config: str | None = None
    config_sha256: str | None = None  # of the files that config was read from; None: of none
