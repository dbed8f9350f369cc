"""What many tests share: one thread, a tiny Vision Transformer, a batch for it, adapters that do something."""

import errno
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from peft_vit.core.adapters import site_adapters
from peft_vit.core.adapters.matmuls import MatmulTimes
from peft_vit.core.quantization.integers import Bits, exact_matmuls
from peft_vit.runs.this_machine import matmuls

NO_GPU = "needs an NVIDIA GPU, and torch sees none; run `make test-gpu` where there is one"

# On Intel's processors MKL adds in an order that follows where memory lies, so equal products differ in last bits;
# it reads this at its first product, and no other library or processor does.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
torch.set_num_threads(1)  # every model here is too small for two; and the number of threads changes bits

# No test holds a clock: an example may take as long as a busy machine needs.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


@pytest.fixture(autouse=True, scope="module")
def _old_objects_are_left_alone() -> None:
    """Keep what libraries and the tests' modules hold out of the garbage collections that every run asks for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _integers_are_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `compute: auto` be float, whatever this machine's products take; `int8` is computed as it is asked for."""

    def found(device: torch.device, precision: str, bits: Bits | None = None) -> MatmulTimes:
        return MatmulTimes(next(iter(exact_matmuls(64, device.type, bits)), None), 1.0, 1.0)

    monkeypatch.setattr(matmuls, "choose_product", found)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Take back what a run before set: its study's threads, of which small products would wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_vit() -> Callable[..., VisionTransformer]:
    """Make a VisionTransformer of width 64 for 32 px; all its values are random, biases and norms too."""

    def make(seed: int = 0, depth: int = 2, num_classes: int = 5) -> VisionTransformer:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = VisionTransformer(
                img_size=32, patch_size=8, embed_dim=64, depth=depth, num_heads=4, mlp_ratio=2, num_classes=num_classes
            )
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Return 6 images (6, 3, 32, 32) and their labels (6,) of 5 classes."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a folder one that can't be listed. Tests may run as root, who may list any, whatever its permissions."""

    def make(folder: Path) -> None:
        list_folder = os.scandir

        def scandir(path: Any = ".") -> Any:
            if not isinstance(path, int) and Path(path) == folder:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return list_folder(path)

        monkeypatch.setattr(os, "scandir", scandir)

    return make


@pytest.fixture
def fill_adapters() -> Callable[[nn.Module], None]:
    """Give every adapter random factors, so that its update is of the weights' order."""

    def fill(model: nn.Module, seed: int = 1, std: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for adapter in site_adapters(model).values():
                for parameter in adapter.parameters():
                    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))

    return fill


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make packages as good as not installed."""

    def hide(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.fixture(scope="session")
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache(_session_cache: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Keep this session's decoded images apart from the user's."""
    monkeypatch.setenv("PEFT_VIT_CACHE", _session_cache)
    return _session_cache


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud what a machine without a browser or a GPU did not check: a skip is easily overlooked."""
    skips = [r for r in terminalreporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple)]
    for what, listed, skipped in (
        (
            "the report's page in a browser",
            "Figures that draw and answer, axe, no request, no console error, 360 px, dark, print, hostile names",
            [r for r in skips if "Chromium" in r.longrepr[2]],
        ),
        (
            "training on a GPU",
            "bf16 beside fp32 on the CPU, device memory that resizing and packing free",
            [r for r in skips if NO_GPU in r.longrepr[2]],
        ),
    ):
        if skipped:
            reasons = sorted({str(r.longrepr[2]) for r in skipped})
            terminalreporter.section(f"NOT CHECKED: {what}", yellow=True)
            terminalreporter.write_line(f"{listed}: {len(skipped)} skipped. {'; '.join(reasons)}")
