"""Which experiments a hypothesis is about: by name, by method, by what their settings say. Never by their results."""

from __future__ import annotations

import json
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError, model_validator

from experiments.hypotheses.measures import Group
from peft_vit.core.config import ExperimentConfig, Frozen, MethodName

Value = bool | int | float | str | None


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a section, which may be left out; None for a plain setting."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _type_of(path: str) -> Any:
    """Return the type of a setting of an experiment by its dotted name, ``qa_lora.quantization_bits``."""
    model: type[BaseModel] | None = ExperimentConfig
    annotation: Any = None
    for part in path.split("."):
        if model is None or part not in model.model_fields:
            raise ValueError(f"an experiment has no setting {path!r}; write it as in qa_lora.quantization_bits")
        annotation = model.model_fields[part].annotation
        model = _section(annotation)
    return annotation


def _known_setting(path: str) -> str:
    _type_of(path)
    return path


def _possible(conditions: dict[str, Value | tuple[Value, ...]]) -> dict[str, Value | tuple[Value, ...]]:
    for path, values in conditions.items():
        for value in _listed(values):
            try:
                TypeAdapter(_type_of(path)).validate_json(json.dumps(value), strict=True)
            except ValidationError:
                raise ValueError(f"{path} is never {value!r}; correct it") from None
    return conditions


Setting = Annotated[str, AfterValidator(_known_setting)]
Conditions = Annotated[dict[Setting, Value | tuple[Value, ...]], AfterValidator(_possible)]


class Selection(Frozen):
    """Experiments of a study; all that is said must hold."""

    names: tuple[str, ...] = Field(default=(), description="patterns as in lora_r*; one must fit")
    methods: tuple[MethodName, ...] = Field(default=(), description="one must be its own")
    where: Conditions = Field(default={}, description="settings and the value, or values, that they have")
    unless: Conditions = Field(default={}, description="settings and the values that exclude an experiment")
    reference_lora: bool = Field(
        default=False, description="only the fixed-rank LoRA of largest rank up to 8; without one, the smallest"
    )

    @property
    def group(self) -> Group:
        """Return the experiments of a study that are meant."""
        return Group(self.methods, self.where, self.unless, self.names, self.reference_lora)


class Reference(Selection):
    """What an experiment is compared with."""

    same_but: tuple[Setting, ...] = Field(
        default=(), description="only experiments whose settings differ in some of these and in nothing else"
    )

    @model_validator(mode="after")
    def _one_reference(self) -> Reference:
        if self.same_but == () and not (self.names or self.methods or self.where or self.reference_lora):
            raise ValueError("says nothing of what to compare with; give names, methods, where or same_but")
        return self


def _listed(values: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    return values if isinstance(values, tuple) else (values,)
