"""How far the score `fisher` is from the empirical Fisher that it stands in for.

With g_n the gradient of sample n's loss with respect to a triplet's parameters, on the same N samples and weights,

    per sample   1/N sum_n ||g_n||^2       trace of the diagonal empirical Fisher (arXiv 1905.12558, eq. 3)
    minibatch    || 1/N sum_n g_n ||^2     what `fisher` smooths over steps; noise that averages out over the batch,
                                           which is most of the first, is not in it

and a site's value is the mean over its triplets. Neither is the Fisher: labels come from the data, not from the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vit.adapters import site_adapters
from peft_vit.allocation.importance import mean_per_triplet, squared_gradients
from peft_vit.backbones import evaluating
from peft_vit.errors import UserError
from peft_vit.records import FisherCheck
from peft_vit.statistics import spearman


def check_fisher(
    model: nn.Module, images: Tensor, labels: Tensor, *, class_weights: Tensor | None = None
) -> FisherCheck:
    """Compare both quantities at the model's present weights, in float32; no gradient is left behind.

    It takes one backward pass a sample, so its memory is that of a batch of one.

    Args:
        model: carries the adapters.
        images: calibration batch (N, 3, S, S) of training images, normalised, on the model's device.
        labels: (N,) int64.
        class_weights: (classes,) of the training loss, if it has any; g_n then carries its sample's weight, so that
            the mean is still the gradient of the batch's loss, which divides by N.

    Raises:
        UserError: if no site has rank.
    """
    adapters = {name: adapter for name, adapter in site_adapters(model).items() if adapter.rank}
    if not adapters:
        raise UserError("no site has rank; there is nothing to compare", field="model")
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    share = torch.ones(len(labels), device=labels.device) if class_weights is None else class_weights[labels]  # (N,)
    per_sample = dict.fromkeys(adapters, 0.0)
    mean_gradients = [torch.zeros_like(parameter) for parameter in parameters]
    with evaluating(model):
        for image, label, factor in zip(images, labels, share, strict=True):
            model.zero_grad(set_to_none=True)
            (factor * F.cross_entropy(model(image[None]), label[None])).backward()
            for name, value in mean_per_triplet(squared_gradients(adapters)).items():
                per_sample[name] += value / len(labels)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_add_(mean_gradients, gradients, alpha=1 / len(labels))
    for parameter, gradient in zip(parameters, mean_gradients, strict=True):
        parameter.grad = gradient
    minibatch = mean_per_triplet(squared_gradients(adapters))
    model.zero_grad(set_to_none=True)
    rho = spearman(list(minibatch.values()), list(per_sample.values()))
    return FisherCheck(images=len(labels), minibatch=minibatch, per_sample=per_sample, rho=rho)
