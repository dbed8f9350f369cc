"""`python -m peft_vit.cli` is `peft-vit`."""

from peft_vit.cli import main

main()
