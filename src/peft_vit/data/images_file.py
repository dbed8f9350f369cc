"""What looking at a folder of images has found, as a file that a study names: `data.images_file`."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from peft_vit.data.index import ImageIndex
from peft_vit.errors import UserError, first_fault
from peft_vit.safe_io import read_bytes
from peft_vit.settings import Frozen

_REMEDY = "look at the images again"


class ImagesFile(Frozen):
    """Which images of a folder are used, by their names relative to it.

    `sha256` is of the names and contents of those that are used.
    """

    version: Literal[1] = 1
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    left_out: dict[str, str]  # why, by name
    copies: tuple[tuple[str, ...], ...]  # exact and near copies of one image; they stand on one side of every split
    sealed: tuple[str, ...]  # tested once in the end; in no fold, and neither trained on nor validated with

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read it; raises UserError naming the file, and the field if its content is at fault."""
        try:
            return cls.model_validate_json(read_bytes(file))
        except OSError as error:
            problem = f"can't be read ({error.strerror}); {_REMEDY}"
            raise UserError(problem, file=file, field="data.images_file") from None
        except ValidationError as error:
            field, message = first_fault(error)
            raise UserError(f"{message[0].lower()}{message[1:]}; {_REMEDY}", file=file, field=field) from None

    def applied(self, index: ImageIndex, path: Path, file: Path | None) -> ImageIndex:
        """Return the index of the files that are not left out, with its groups and its test split.

        Args:
            index: of these files, as they are now.
            path: of the folder, named in errors.
            file: this one, likewise.

        Raises:
            UserError: if the folder's images are not those that were looked at, or names here are of none of them.
        """
        assert index.names is not None
        if index.sha256 != self.sha256:
            problem = f"holds other images than when they were looked at ({file}); {_REMEDY}"
            raise UserError(problem, file=path, field="data.path")
        place = {name: i for i, name in enumerate(index.names)}
        groups = np.arange(len(place), dtype=np.int64)
        sealed = np.zeros(len(place), dtype=bool)
        try:
            for names in self.copies:
                groups[[place[name] for name in names]] = place[names[0]]
            sealed[[place[name] for name in self.sealed]] = True
        except LookupError:
            raise UserError(f"names an image that is not used; {_REMEDY}", file=file, field="copies, sealed") from None
        if len(np.unique(groups[sealed])) + len(np.unique(groups[~sealed])) > len(np.unique(groups)):
            raise UserError(f"an image and its copy are on two sides; {_REMEDY}", file=file, field="sealed")
        content = hashlib.sha256(f"{index.sha256}\0{self.model_dump_json()}".encode()).hexdigest()
        return replace(
            index, contents=groups, official_test=sealed if sealed.any() else None, sha256=content, looked_at=True
        )
