"""Adapters sit on a model's sites once and start from the seed alone; how far the first step of each form goes."""

import pytest
import torch
from torch import nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import (
    SiteAdapter,
    adapter_bytes,
    attach_adapters,
    current_ranks,
    freeze_backbone,
    load_trained,
    merged_state_dict,
    site_adapters,
)
from peft_vit.core.backbones import find_sites

WIDTH, RANK = 384, 8


def adapter(parametrization: str, **form) -> SiteAdapter:
    generator = torch.Generator().manual_seed(0)
    return SiteAdapter(WIDTH, WIDTH, RANK, scale=2.0, generator=generator, parametrization=parametrization, **form)


def first_step(site: SiteAdapter) -> float:
    """Return the norm of dW after one step of Adam on the loss <G, dW> with a random G."""
    optimizer = torch.optim.Adam(site.parameters(), lr=1e-3)
    gradient = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    (site.delta() * gradient).sum().backward()
    assert not site.delta().any()  # every form starts at no update
    optimizer.step()
    return float(site.delta().detach().norm())


def test_the_published_start_moves_about_75_times_less_than_lora() -> None:
    product = first_step(adapter("product"))
    assert 60 < product / first_step(adapter("svd")) < 90
    assert 0.8 < product / first_step(adapter("svd", lambda_gain=75.0)) < 1.25


def along_the_gradient(site: SiteAdapter) -> float:
    """Return <G, d(dW)> of a step of Adam from where the site is."""
    gradient = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    before = site.delta().detach()
    site.zero_grad()
    optimizer = torch.optim.Adam(site.parameters(), lr=1e-4)
    (site.delta() * gradient).sum().backward()
    optimizer.step()
    return float(((before - site.delta().detach()) * gradient).sum())


def started_at(rank: int, reference_rank: float | None) -> SiteAdapter:
    site = SiteAdapter(WIDTH, WIDTH, 0, scale=2.0, generator=torch.Generator().manual_seed(0))
    site.reference_rank = reference_rank
    site.lora_A, site.lora_B = (nn.Parameter(factor) for factor in site.fresh_triplets(rank)[:2])
    return site


def test_a_step_goes_as_far_at_any_rank_as_at_the_reference_rank() -> None:
    reference = along_the_gradient(started_at(8, None))
    assert 3.8 < along_the_gradient(started_at(32, None)) / reference < 4.2  # four times the rank, four times as far
    for rank in (1, 2, 8, 32):
        assert 0.9 < along_the_gradient(started_at(rank, 8)) / reference < 1.1
    assert along_the_gradient(started_at(8, 8)) == reference  # there it starts as LoRA does


def test_the_form_published_for_svd_knows_no_reference_rank() -> None:
    site = SiteAdapter(WIDTH, WIDTH, 0, scale=2.0, generator=torch.Generator().manual_seed(0), parametrization="svd")
    plain = site.fresh_triplets(16)
    site.generator.manual_seed(0)
    site.reference_rank = 8.0
    for without, with_reference in zip(plain, site.fresh_triplets(16), strict=True):
        assert torch.equal(without, with_reference)


def test_an_orthonormal_start_has_no_penalty_and_moves_further() -> None:
    published, orthonormal = adapter("svd"), adapter("svd", factor_start="orthonormal")
    assert orthonormal.orthogonality() < 1e-4
    assert published.orthogonality() > 1
    eye = torch.eye(RANK)
    torch.testing.assert_close(orthonormal.lora_A @ orthonormal.lora_A.T, eye)
    torch.testing.assert_close(orthonormal.lora_B.T @ orthonormal.lora_B, eye)
    assert 5 < first_step(orthonormal) / first_step(published) < 8  # 1 / (384 * 0.02^2) = 6.5


@pytest.mark.parametrize(("optimizer", "power"), [(torch.optim.Adam, 1), (torch.optim.AdamW, 1), (torch.optim.SGD, 2)])
def test_a_gain_of_k_acts_as_k_times_the_rate_under_adam_and_k_squared_times_under_sgd(optimizer, power) -> None:
    def step(gain: float, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return dW after one step of lambda alone, and the gradient of lambda."""
        site = adapter("svd", lambda_gain=gain)
        assert site.lora_lambda is not None
        gradient = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
        (site.delta() * gradient).sum().backward()
        optimizer([site.lora_lambda], lr=rate).step()
        return site.delta().detach(), site.lora_lambda.grad

    (tuned, steep), (plain, flat), (faster, _) = step(3.0, 1e-3), step(1.0, 1e-3), step(1.0, 1e-3 * 3.0**power)
    torch.testing.assert_close(steep, 3.0 * flat)
    torch.testing.assert_close(tuned, 3.0**power * plain, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(tuned, faster, rtol=1e-4, atol=1e-9)


def test_the_gain_is_part_of_the_update_and_of_the_file(tiny_vit, batch, fill_adapters, tmp_path) -> None:
    def model(gain: float) -> nn.Module:
        vit = tiny_vit()
        attach_adapters(vit, find_sites(vit), 2, scale=1.0, seed=0, parametrization="svd", lambda_gain=gain)
        return vit.eval()

    tuned = model(5.0)
    fill_adapters(tuned, std=0.3)
    first = next(iter(site_adapters(tuned).values()))
    expected = first.lora_B.double() @ torch.diag(5.0 * first.lora_lambda.double()) @ first.lora_A.double()
    torch.testing.assert_close(first.delta().double(), expected, rtol=1e-5, atol=1e-6)
    plain = tiny_vit().eval()
    plain.load_state_dict(merged_state_dict(tuned))
    torch.testing.assert_close(plain(batch[0]), tuned(batch[0]), rtol=0, atol=1e-5)

    file = tmp_path / "adapter.safetensors"
    file.write_bytes(adapter_bytes(tuned, {}))
    again = model(5.0)
    load_trained(again, file)
    assert torch.equal(again(batch[0]), tuned(batch[0]))
    with pytest.raises(UserError, match="lambda_gain"):  # another gain would be another model
        load_trained(model(1.0), file)


def attach(model: nn.Module, rank: int = 2, seed: int = 0, targets=("query", "fc2")) -> nn.Module:
    attach_adapters(model, find_sites(model, targets), rank, scale=2.0, seed=seed)
    return model


def test_only_head_and_adapters_are_trainable_and_listed_in_order(tiny_vit) -> None:
    model = attach(tiny_vit())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = ("lora_A", "lora_B")
    sites = ("attn.qkv.sites.query", "mlp.fc2.sites.fc2")
    expected = {f"blocks.{i}.{site}.{factor}" for i in range(2) for site in sites for factor in factors}
    assert trainable == expected | {"head.weight", "head.bias"}
    names = ["blocks.0.attn.query", "blocks.0.mlp.fc2", "blocks.1.attn.query", "blocks.1.mlp.fc2"]
    assert current_ranks(model) == dict.fromkeys(names, 2)
    assert list(current_ranks(model)) == names


def test_attaching_twice_and_a_missing_head_are_refused(tiny_vit) -> None:
    with pytest.raises(UserError, match="attach once"):
        attach(attach(tiny_vit()))
    with pytest.raises(UserError, match="no linear classification head"):
        freeze_backbone(tiny_vit(num_classes=0))


def test_the_start_follows_from_seed_and_site_alone(tiny_vit) -> None:
    few, all_sites = (
        attach(tiny_vit()),
        attach(tiny_vit(seed=5), targets=("query", "key", "value", "out", "fc1", "fc2")),
    )
    other = attach(tiny_vit(), seed=1)
    for name, adapter in site_adapters(few).items():
        assert torch.equal(adapter.lora_A, site_adapters(all_sites)[name].lora_A)
        assert not torch.equal(adapter.lora_A, site_adapters(other)[name].lora_A)
        assert adapter.lora_A.abs().max() <= adapter.in_features**-0.5
    first, second = (site_adapters(few)[f"blocks.{i}.attn.query"].lora_A for i in (0, 1))
    assert not torch.equal(first, second)
