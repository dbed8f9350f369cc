"""Peak memory of loading ViT-B/16 out of a safetensors file and packing it, each side in a process of its own.

    python benchmarks/loading.py [--image-size 224] [--threads 2]

Prints the largest resident memory, mapped pages of the file included, beyond what the process held after its imports:
until all weights are packed, and until training could begin, that is after one image has shown that every adapter has
an effect. Beside it stands what the process holds once all is packed. The weights are random.
"""

from __future__ import annotations

from common import machine, measured_alone, parser, with_one_side, with_tuned_allocator, write

with_tuned_allocator()

import os  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import timm  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from peft_vit.core.adapters import attach_adapters  # noqa: E402
from peft_vit.core.adapters.footprint import frozen_bytes, peak_memory_bytes, reset_peak_memory  # noqa: E402
from peft_vit.core.backbones import find_sites, load_backbone  # noqa: E402
from peft_vit.core.config import BackboneConfig, QaLoraConfig  # noqa: E402
from peft_vit.core.training import QALoRATrainer, qa_lora  # noqa: E402

MODEL = "vit_base_patch16_224"
FILE = "PEFT_VIT_BENCHMARK_WEIGHTS"  # names the file to the process of a side
SIDES = ("nf4, a layer at a time", "nf4 of the whole float model", "float LoRA")
NF4 = QaLoraConfig(quantization_bits=4, quantization_type="nf4", use_group_quantization=True)


def measure(name: str, size: int) -> tuple[int, ...]:
    """Return bytes beyond what is held now: peaks until the weights are there and until training, and what stays.

    What the model's frozen weights take of that comes last.
    """
    peaks, check = [], qa_lora.check_gradients

    def noted(model: torch.nn.Module) -> None:
        peaks.append(peak_memory_bytes())
        reset_peak_memory()
        peaks.append(peak_memory_bytes())
        check(model)

    qa_lora.check_gradients = noted
    config = BackboneConfig(model=MODEL, weights="file", file=os.environ[FILE])
    reset_peak_memory()
    before = peak_memory_bytes()
    mapped = NF4.targets if name == SIDES[0] else None
    model = load_backbone(config, image_size=size, num_classes=2, seed=0, mapped=mapped).model
    if name == SIDES[2]:
        attach_adapters(model, find_sites(model), 8, scale=2.0, seed=0, check=False)
        noted(model)
    else:
        QALoRATrainer(model, NF4, total_steps=100)
    loaded, held = peaks
    return loaded - before, max(loaded, peak_memory_bytes()) - before, held - before, frozen_bytes(model)


def main() -> None:
    options = with_one_side(parser(__doc__, image_size=224, threads=2), SIDES)
    torch.set_num_threads(options.threads)
    if options.side:
        print(*measure(options.side, options.image_size))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        state = timm.create_model(MODEL, img_size=options.image_size).state_dict()
        os.environ[FILE] = str(Path(folder) / "weights.safetensors")
        save_file(state, os.environ[FILE])
        layer = max(tensor.nbytes for tensor in state.values())
        print(f"float weights {sum(one.nbytes for one in state.values()) / 1e6:.1f} MB, largest {layer / 1e6:.1f} MB")
        del state
        for name, *numbers in measured_alone(__file__, SIDES, options, bf16=False, numbers=4):
            loaded, checked, resident, frozen = (number / 1e6 for number in numbers)
            print(
                f"{name:28} until its weights are there {loaded:6.1f} MB, until training {checked:6.1f} MB; "
                f"the process then holds {resident:6.1f} MB, of which frozen weights {frozen:6.1f} MB",
                flush=True,
            )
            rows.append(
                {
                    "side": name,
                    "loaded_bytes": numbers[0],
                    "checked_bytes": numbers[1],
                    "resident_bytes": numbers[2],
                    "frozen_bytes": numbers[3],
                }
            )
    setting = {"model": MODEL, "image_size": options.image_size, "largest_layer_bytes": layer}
    write("loading", {"machine": machine(options.threads), "setting": setting, "rows": rows})


if __name__ == "__main__":
    main()
