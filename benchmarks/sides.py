"""The sides of a comparison: one training setup each, on the same timm model, images and optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import bitsandbytes
import peft
import torch
from torch import Tensor, nn

from peft_vit.core.adapters import attach_adapters, current_ranks, remember_sources, use_int8_matmul
from peft_vit.core.allocation import AdaLoRAController
from peft_vit.core.backbones import Architecture, choose_attention, find_sites
from peft_vit.core.backbones.catalog import build_model
from peft_vit.core.backbones.passes import class_token_alone
from peft_vit.core.config import AdaLoraConfig, QaLoraConfig, TrainingConfig
from peft_vit.core.training import AllocationHook, Hook, QALoRATrainer, optimization_step
from peft_vit.core.training.halves import forward_in_halves, loss_in_halves, takes_halves
from peft_vit.core.training.optimization import build_optimizer
from peft_vit.runs.this_machine.machine import bf16_support

MODEL, BATCH, RANK, START_RANK, SCALE = "vit_small_patch14_dinov2", 32, 8, 12, 2.0
DEVICE = torch.device("cpu")  # of every side, see `use`
PEFT_TARGETS = r"blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)"


def use(device: torch.device) -> None:
    """Build all sides from here on on a device."""
    global DEVICE  # noqa: PLW0603 - of a whole benchmark
    DEVICE = device


class Side:
    """A model with its optimizer; `step` does one training step as a user of that library would.

    Args:
        model: trained model.
        bf16: run the forward pass under autocast.
        image_size: in pixels.
        hooks: of our own methods.
        own_loop: build the optimizer and pass a batch in halves as our training loop does; else as a user writes it.
        after_step: what another library wants to be told, after the optimizer's step, with the step's number.
        penalty: a term that another library leaves to the training loop.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        bf16: bool,
        image_size: int,
        hooks: Sequence[Hook] = (),
        own_loop: bool = False,
        after_step: Callable[[int], Any] | None = None,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        self.model, self.bf16, self.hooks = model, bf16, hooks
        self.after_step, self.penalty = after_step, penalty
        settings = TrainingConfig(epochs=1, learning_rate=1e-3)
        self.optimizer = (
            build_optimizer(model, settings)
            if own_loop
            else torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], settings.learning_rate)
        )
        for hook in hooks:
            hook.attach(model, self.optimizer)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(BATCH, 3, image_size, image_size, generator=generator).to(DEVICE)
        self.labels = torch.randint(0, 2, (BATCH,), generator=generator).to(DEVICE)
        self.steps = 0
        self.own_loop = own_loop
        self.halves = own_loop and takes_halves(model, DEVICE)

    def step(self) -> None:
        """Do forward, backward, clipping, the optimizer's step, and what the method adds; wait until it is done."""
        self._step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(images)
        return nn.functional.cross_entropy(logits.float(), labels) * (len(images) / len(self.images))

    def _step(self) -> None:
        self.steps += 1
        with class_token_alone(self.model) if self.own_loop else nullcontext():
            if self.halves and len(self.images) > 1:
                loss = loss_in_halves(self._loss, self.images, self.labels)
            else:
                loss = self._loss(self.images, self.labels)
        if self.penalty is not None:
            loss = loss + self.penalty()
        if self.after_step is None:
            optimization_step(self.model, self.optimizer, loss, self.steps, hooks=self.hooks, clip_norm=1.0)
            return
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        self.optimizer.step()
        self.after_step(self.steps)
        self.optimizer.zero_grad(set_to_none=True)


def vit(image_size: int, name: str = MODEL) -> Any:
    """Return the backbone with random weights, which change no timing; without branches that are dropped at random."""
    torch.manual_seed(0)
    return build_model(Architecture("timm", name), image_size, 2).to(DEVICE)


def floor(image_size: int, *, bf16: bool, plain_attention: bool = False, name: str = MODEL) -> Side:
    """Return a frozen backbone that passes the gradient to its first block: what no adapter there can avoid."""
    model = vit(image_size, name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.requires_grad_(True)
    model.patch_embed.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))
    if plain_attention:
        choose_attention(model, DEVICE, "bf16")
    return Side(model, bf16=bf16, image_size=image_size)


def lora(
    image_size: int,
    *,
    bf16: bool,
    integers: bool = False,
    light: bool = False,
    mean_rank: float = RANK,
    name: str = MODEL,
    model: nn.Module | None = None,
) -> Side:
    """Return our fixed-rank LoRA; a mean rank that is no whole number is spread evenly over the sites.

    `integers` multiplies frozen weights in int8, `light` computes outputs of norms and activations again. A model may
    be given, say with real weights.
    """
    model = vit(image_size, name) if model is None else model
    choose_attention(model, DEVICE, "bf16" if bf16 else "fp32")
    sites = find_sites(model)
    ends = [round(mean_rank * place) for place in range(len(sites) + 1)]
    ranks = {site.name: ends[place + 1] - ends[place] for place, site in enumerate(sites)}
    attach_adapters(model, sites, ranks, scale=SCALE, seed=0)
    if integers:
        use_int8_matmul(model)
    if light:
        remember_sources(model)
    return Side(model, bf16=bf16, image_size=image_size, own_loop=True)


def adalora(image_size: int, *, bf16: bool, total_steps: int, integers: bool = False) -> tuple[Side, AdaLoRAController]:
    """Return our AdaLoRA from rank 12 to 8 a site."""
    model = vit(image_size)
    choose_attention(model, DEVICE, "bf16" if bf16 else "fp32")
    count = len(find_sites(model))
    config = AdaLoraConfig(
        total_rank_budget=RANK * count,
        initial_budget=START_RANK * count,
        allocation_strategy="global",
        importance_metric="sensitivity",
        warmup_steps=total_steps // 8,
        update_frequency=max(1, total_steps // 24),
        final_steps=total_steps // 4,
        scale=SCALE,
    )
    controller = AdaLoRAController(model, config, total_steps)
    if integers:
        use_int8_matmul(model)
    hooks = [AllocationHook(controller)]
    return Side(model, bf16=bf16, image_size=image_size, hooks=hooks, own_loop=True), controller


def peft_lora(image_size: int, *, bf16: bool, name: str = MODEL) -> Side:
    """Return PEFT's LoRA on the same matrices; it sees query, key and value as one."""
    model = vit(image_size, name)
    targets = [*dict.fromkeys(site.module for site in find_sites(model))]
    config = peft.LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=targets, modules_to_save=["head"])
    return Side(peft.get_peft_model(model, config).to(DEVICE), bf16=bf16, image_size=image_size)


def peft_qlora(image_size: int, *, bf16: bool, name: str = MODEL) -> Side:
    """Return PEFT's LoRA over bitsandbytes' NF4 layers as they come: groups of 64, scales quantized again."""
    model = vit(image_size, name)
    for place, module in list(model.named_modules()):
        if re.fullmatch(PEFT_TARGETS, place):
            packed = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, quant_type="nf4")
            packed.load_state_dict(module.state_dict())
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, packed.to(DEVICE))  # moving quantizes
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(SCALE * RANK), target_modules=PEFT_TARGETS, modules_to_save=["head"]
    )
    adapted = peft.get_peft_model(model, config)
    assert all(module.weight.dtype == torch.uint8 for module in bnb_layers(adapted))
    return Side(adapted, bf16=bf16, image_size=image_size)


def bnb_layers(model: nn.Module) -> list[bitsandbytes.nn.Linear4bit]:
    """Return the packed layers of bitsandbytes."""
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def features(image_size: int, *, integers: bool = False) -> Callable[[], Any]:
    """Return a pass of a frozen backbone: timm's in float32, or ours with products in int8."""
    model = vit(image_size).eval().requires_grad_(False)
    images = torch.randn(BATCH, 3, image_size, image_size, device=DEVICE)
    bf16 = integers and bf16_support(DEVICE).native
    if integers:
        use_int8_matmul(model)
        choose_attention(model, DEVICE, "bf16" if bf16 else "fp32")

    def forward(part: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            result: Tensor = model.forward_features(part)
        return result

    def run() -> None:
        with class_token_alone(model) if integers else nullcontext():
            (forward_in_halves(forward, images, DEVICE) if integers else forward(images)).cpu()  # waits for a GPU

    return run


def qa_lora(
    image_size: int,
    *,
    bf16: bool,
    type: str,
    integers: bool = False,
    group_size: int | None = 32,
    offset: bool | None = None,
    name: str = MODEL,
) -> Side:
    """Return our adapters over packed weights; a group size of None is one scale a row and plain adapters."""
    model = vit(image_size, name)
    choose_attention(model, DEVICE, "bf16" if bf16 else "fp32")
    config = QaLoraConfig(
        quantization_bits=8 if type == "int8" else 4,
        quantization_type=type,
        quantization_schedule="constant",
        gradient_scaling_factor=1.0,
        use_group_quantization=group_size is not None,
        **({} if group_size is None else {"group_size": group_size}),
        quantization_offset=offset,
        rank=min(RANK, 384 // (group_size or 1)),
        scale=SCALE,
    )
    trainer = QALoRATrainer(model, config, total_steps=10_000)
    if integers:
        use_int8_matmul(model)
    return Side(model, bf16=bf16, image_size=image_size, hooks=[trainer], own_loop=True)


def peft_adalora(image_size: int, *, bf16: bool, total_steps: int) -> Side:
    """Return PEFT's AdaLoRA from rank 12 to 8, with its orthogonality term, which it leaves out on vision models."""
    config = peft.AdaLoraConfig(
        init_r=START_RANK,
        target_r=RANK,
        lora_alpha=int(SCALE * START_RANK),
        target_modules=PEFT_TARGETS,
        modules_to_save=["head"],
        total_step=total_steps,
        tinit=total_steps // 8,
        tfinal=total_steps // 4,
        deltaT=max(1, total_steps // 24),
        orth_reg_weight=0.5,
    )
    model = peft.get_peft_model(vit(image_size), config)
    factors = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]

    def penalty() -> Tensor:
        terms = []
        for factor in factors:
            gram = factor @ factor.T if factor.shape[0] < factor.shape[1] else factor.T @ factor
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return 0.5 * torch.stack(terms).mean()

    return Side(
        model, bf16=bf16, image_size=image_size, penalty=penalty, after_step=model.base_model.update_and_allocate
    )


def mean_rank(side: Side) -> float:
    """Return the mean rank over the sites now."""
    ranks = current_ranks(side.model).values()
    return sum(ranks) / len(ranks)
