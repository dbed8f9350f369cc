"""What training cannot do is refused in one line that names the argument or the setting; the model is not trained."""

from collections.abc import Callable

import pytest
import torch
from qa_lora_settings import SILENT, config, scheduled
from torch import nn

from peft_vit import QALoRATrainer, allocate_bits
from peft_vit.base.errors import UserError
from peft_vit.core.adapters import attach_adapters
from peft_vit.core.backbones import describe, find_sites
from peft_vit.core.config import BackboneConfig, QaLoraConfig, TrainingConfig
from peft_vit.core.training import check_bits, train
from peft_vit.core.training.quantized_layers import check_ranks, format_of

pytestmark = [pytest.mark.part("configuration"), SILENT]
Make = Callable[..., nn.Module]
IMAGES = torch.zeros(2, 3, 32, 32)


def packed(make: Callable[[Make], nn.Module] = lambda vit: vit(), settings: QaLoraConfig | None = None, **given):
    """Return what quantizes a model."""
    return lambda vit: QALoRATrainer(make(vit), config(rank=2) if settings is None else settings, 8, **given)


def adapted(vit: Make) -> nn.Module:
    """Return a model with adapters over groups of 16."""
    model = vit()
    attach_adapters(model, find_sites(model, ("query", "fc1")), 2, scale=2.0, seed=0, pool=16)
    return model


def quantized(vit: Make) -> nn.Module:
    QALoRATrainer(model := vit(), config(rank=2), 8)
    return model


def adaptive(**settings) -> QaLoraConfig:
    rank = None if settings.get("ranks") else 2
    bits = {"quantization_bits": None, "quantization_type": None, "adaptive_bits": settings}
    return config(**bits, rank=rank, targets=("query", "key", "value", "out", "fc1", "fc2"))


def with_reference(change: Callable[[dict], object]):
    """Return what measures the balance against float weights, one of which was changed."""

    def measure(vit: Make) -> None:
        state = dict(vit().state_dict())
        change(state)
        trainer = QALoRATrainer(model := vit(), config(rank=1), 8)
        trainer.validate_quantization_adaptation_balance(model, reference=state)

    return measure


def other_state(steps: int = 8, seed: int = 0, **settings):
    """Return what loads the state of another run."""

    def load(vit: Make) -> None:
        state = QALoRATrainer(vit(), scheduled(rank=2), 8).state_dict()
        trainer = QALoRATrainer(model := vit(seed), scheduled(rank=2, **settings), steps)
        trainer.load_state_dict(state, model)

    return load


def outputs_without_floats(vit: Make) -> None:
    trainer = QALoRATrainer(model := vit(), config(rank=1), 8)
    trainer.validate_quantization_adaptation_balance(model, images=IMAGES)


def bits_under_adapters(vit: Make) -> None:
    allocate_bits(quantized(vit), adaptive(average_bits=6.0), IMAGES, torch.tensor([0, 1]))


def plain(**settings):
    """Return what quantizes a plain model by other settings."""
    return packed(settings=config(**settings))


FC1, FC2 = "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"
END, GROUPS, REFERENCE = "qa_lora.quantization_end_step", "qa_lora.group_size", f"reference[{FC2}]"
WEIGHT = f"{FC2}.weight"
TOO_LATE = scheduled(quantization_end_step=9)
WARM_UP = scheduled(quantization_warmup_steps=8, quantization_end_step=None)
OF_8 = {FC1: format_of(config(group_size=8))}
REFUSED: dict[str, tuple[Callable[[Make], object], str, str]] = {
    # --- the schedule
    "it ends after the run": (packed(settings=TOO_LATE), END, "8"),
    "its warm-up takes the run": (packed(settings=WARM_UP), END, "8"),
    # --- groups, ranks and formats
    "groups that do not divide": (plain(group_size=48, rank=2), GROUPS, "attn.query"),
    "a rank above the groups": (plain(group_size=32, rank=3), "rank", "at most 2"),
    "a rank above fc2's groups": (plain(group_size=32, rank=5, targets=("fc2",)), "rank", "at most 4"),
    "above the smaller side": (plain(use_group_quantization=False, group_size=32, rank=65), "rank", "at most 64"),
    "a format of no layer": (packed(formats={"blocks.9.attn.qkv": None}), "formats", "blocks.9.attn.qkv"),
    "a format of other groups": (packed(formats=OF_8), f"formats[{FC1}]", "pool 16 inputs"),
    "a rank of one module alone": (packed(settings=config(), ranks={"blocks.0.attn.query": 1}), "ranks", "attn.key"),
    # --- adapters that are there
    "other groups than theirs": (packed(adapted, config(group_size=32)), GROUPS, "16"),
    "another rank": (packed(adapted, config(rank=3)), "qa_lora.rank", ""),
    "another scale": (packed(adapted, config(scale=1.0)), "qa_lora.scale", "2.0"),
    "other targets": (packed(adapted, config(targets=("query",))), "qa_lora.targets", "fc1, query"),
    "ranks beside theirs": (packed(adapted, config(), ranks={}), "ranks", ""),
    "weights that are packed already": (packed(quantized, config()), "model", "quantized already"),
    # --- images
    "gptq without images": (plain(rounding="gptq", rank=2), "images", "gptq"),
    "images without gptq": (packed(images=IMAGES), "images", "nearest"),
    "images beside saved weights": (packed(images=IMAGES, packed={}), "images", "saved weights"),
    "saved weights of other layers": (packed(packed={}), "packed", "blocks.0.attn.proj"),
    # --- adaptive bits
    "bits that nobody has chosen": (packed(settings=adaptive(average_bits=5.0)), "qa_lora.adaptive_bits", "formats"),
    "bits of a model with adapters": (bits_under_adapters, "model", "before"),
    # --- a balance and a state
    "a float weight is missing": (with_reference(lambda state: state.pop(WEIGHT)), REFERENCE, "nothing"),
    "of another shape": (with_reference(lambda state: state.update({WEIGHT: IMAGES[0, 0]})), REFERENCE, "(64, 128)"),
    "another": (with_reference(lambda state: state.update({WEIGHT: 2 * state[WEIGHT]})), REFERENCE, "relative error"),
    "outputs without float weights": (outputs_without_floats, "reference", "gone"),
    "a state of other settings": (other_state(quantization_end_step=5), "config", ""),
    "a state of a longer run": (other_state(steps=9), "total_steps", ""),
    "a state of other weights": (other_state(seed=1), "relative_error", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_line_with_its_field(tiny_vit, case: str) -> None:
    attempt, field, stated = REFUSED[case]
    with pytest.raises(UserError) as caught:
        attempt(tiny_vit)
    assert caught.value.field == field
    assert stated in caught.value.message
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "field", "bounds"),
    [
        ({"total_byte_budget": 32767}, "total_byte_budget", ("32768", "81920")),
        ({"total_byte_budget": 81920}, "total_byte_budget", ("32768", "81920")),
        ({"average_bits": 3.9}, "average_bits", ("4 ", "10 ")),
        ({"average_bits": 10.0}, "average_bits", ("4 ", "10 ")),
        ({"total_byte_budget": 33_000, "ranks": True}, "total_byte_budget", ("33040", "one rank")),
    ],
)
def test_budgets_that_leave_nothing_to_choose(tiny_vit, batch, settings, field, bounds) -> None:
    model, settings = tiny_vit(), adaptive(**settings)
    for refuse in (lambda: check_bits(settings, find_sites(model)), lambda: allocate_bits(model, settings, *batch)):
        with pytest.raises(UserError) as caught:
            refuse()
        assert caught.value.field == f"qa_lora.adaptive_bits.{field}"
        assert all(bound in caught.value.message for bound in bounds)


@pytest.mark.parametrize(
    ("name", "group", "common"), [("swin_tiny_patch4_window7_224", 64, 96), ("vit_so400m_patch14_siglip_224", 32, 16)]
)
def test_groups_that_do_not_divide_are_refused_with_what_all_sites_share(name, group, common) -> None:
    sites = describe(BackboneConfig(model=name, weights="random"), 224).sites
    with pytest.raises(UserError, match=rf"{group} does not divide .* inputs .* use a divisor of {common}$"):
        check_ranks(sites, 0, group)
    check_ranks(sites, 1, common)


def test_a_limit_that_nobody_has_met_yet_is_no_training(tiny_vit, data, runtime) -> None:
    limited = TrainingConfig(epochs=1, batch_size=8, learning_rate=3e-3, memory_limit="1GB")
    with pytest.raises(UserError, match=r"^training\.memory_limit: is for studies alone"):
        train(tiny_vit(), data(), limited, runtime, seed=4)
