"""What works on a model: sites that act, merging, exported files, PEFT's own LoRA, and PEFT's reading of our adapters.

Updates are random and large enough to be seen: half of a site's weight in norm.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_vit.base.errors import first_line
from peft_vit.base.extras import require_extra
from peft_vit.core.adapters import Effect, adapted_modules, attach_adapters, effects, merged_state_dict
from peft_vit.core.adapters.attach import effects_of
from peft_vit.core.adapters.peft_format import export_peft
from peft_vit.core.adapters.peft_tuner import load_peft
from peft_vit.core.backbones import Architecture, Backbone, Site, find_sites, fused_sites, native_size
from peft_vit.core.backbones.catalog import build_model
from peft_vit.core.config import EXPORTS
from peft_vit.deploy.formats.header import ExportMetadata
from peft_vit.deploy.predicting import open_exported, writer_of

_RANK = 2
_IMAGES, _CLASSES = 2, 5
LARGEST_MERGE_ERROR, LARGEST_ONNX_ERROR = 1e-5, 1e-4  # of the largest logit; OpenVINO's as ONNX's


@dataclass(frozen=True)
class Deviation:
    """How far the logits of what was made are from those of the model with adapters, over the largest of these.

    Attributes:
        error: None if it could not be made.
        fault: why not.
    """

    error: float | None
    fault: str | None = None

    def __str__(self) -> str:
        return f"FAILED, {self.fault}" if self.error is None else f"differs by {self.error:.0e} of the largest logit"


@dataclass(frozen=True)
class ModelCheck:
    """What works on a model.

    Attributes:
        sites: all of it, and the effect of an adapter there.
        merged: a plain model with the merged weights.
        files: exported files, opened again, by the format's name.
        peft: PEFT, reading the adapter that is exported; None if that was not asked for.
        peft_idle: the reason why PEFT's LoRA has no effect on the model as it is built, by the names of modules.
    """

    sites: tuple[tuple[Site, Effect], ...]
    merged: Deviation
    files: dict[str, Deviation]
    peft: Deviation | None
    peft_idle: dict[str, str]

    @property
    def effective(self) -> int:
        """Return how many sites' adapters have an effect."""
        return sum(effect.fault is None for _, effect in self.sites)


def check_architecture(
    architecture: Architecture, image_size: int | None = None, *, formats: Sequence[str] = ("onnx",), peft: bool = False
) -> ModelCheck:
    """Put adapters on all sites of a model with random weights, and see what works.

    Args:
        architecture: of the model.
        image_size: side in pixels; None: that of pretraining.
        formats: of EXPORTS, that are files: what to export to.
        peft: let the PEFT library do likewise; it takes 90 MB.

    Raises:
        UserError: if the model is unknown, can't be adapted, or does not take images of this size, or a format but ONNX
            is asked for and its packages are not installed.
    """
    for name in formats:
        if name != "onnx" and (extra := EXPORTS[name].extra):
            require_extra(extra, f"{EXPORTS[name].title} export")
    side = native_size(architecture) if image_size is None else image_size
    card = card_of_random(architecture, side, tuple(map(str, range(_CLASSES))), "check")

    def build() -> nn.Module:
        return random_weights(build_model(architecture, side, _CLASSES)).eval()

    model = build()
    sites = find_sites(model)
    attach_adapters(model, sites, _RANK, scale=1.0, seed=0, check=False)
    _fill_with_updates(model)
    effect = effects(model)
    images = torch.randn(_IMAGES, *Backbone(model).input_size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        logits = model(images)
    state = merged_state_dict(model)

    def prepared() -> nn.Module:
        plain = build()
        Backbone(plain).prepare()
        return plain

    def merged() -> nn.Module:
        plain = prepared()
        plain.load_state_dict(state)
        return plain

    def by_file(name: str) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"model{EXPORTS[name].ending}"
            writer_of(name)(merged(), file, card, None)
            return torch.from_numpy(open_exported(file).logits(images.numpy()))

    def by_peft() -> Tensor:
        load_peft()
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            export_peft(model, Path(folder), {})
            return PeftModel.from_pretrained(prepared(), folder).eval()(images)

    def compared(run: Callable[[], Tensor]) -> Deviation:
        try:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                others = run()
        except Exception as error:  # whatever it is that a library can't do with this model
            return Deviation(None, first_line(error))
        return Deviation(float((others - logits).abs().max() / logits.abs().max()))

    return ModelCheck(
        tuple((site, effect[site.name]) for site in sites),
        compared(lambda: merged()(images)),
        {name: compared(partial(by_file, name)) for name in formats},
        compared(by_peft) if peft else None,
        _idle_of_peft(build) if peft else {},
    )


def _fill_with_updates(model: nn.Module) -> None:
    """Let the adapters of each module add random updates, together of half of its weight's norm."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, module in adapted_modules(model):
            size = 0.5 * float(module.frozen_weight().norm()) / len(module.adapters()) ** 0.5
            for _, adapter in module.adapters():
                adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator))
                adapter.lora_B.mul_(size / float(adapter.delta().norm()))


def random_weights(model: nn.Module) -> nn.Module:
    """Fill a model with values that are nowhere zero, each time the same: N(0, 1 / in) matrices, others near 1 or 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))
    return model


def card_of_random(architecture: Architecture, image_size: int, class_names: Sequence[str], run: str) -> ExportMetadata:
    """Return what a file says of a model with random weights, which is written to be tried or timed."""
    return ExportMetadata(
        run=run,
        library=architecture.library,
        model=architecture.name,
        config=architecture.config,
        head_blocks=architecture.head_blocks,
        weights_name="random",
        weights_sha256=None,
        image_size=image_size,
        channels=3,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        class_names=tuple(class_names),
    )


def _idle_of_peft(build: Callable[[], nn.Module]) -> dict[str, str]:
    """Return where PEFT's LoRA has no effect on a model as it is built, by module."""
    load_peft()
    from peft import LoraConfig, get_peft_model

    names = list(fused_sites(find_sites(build())))
    model = build()  # of which nothing prepares the modules' calls
    get_peft_model(model, LoraConfig(r=_RANK, target_modules=names))
    parameters = {
        name: [part for key, part in model.get_submodule(name).named_parameters() if "lora_" in key] for name in names
    }
    effects_by_module = effects_of(Backbone(model), {name: name for name in names}, parameters)
    return {name: effect.fault for name, effect in effects_by_module.items() if effect.fault}
