"""Full fine-tuning: every weight is trained as it is."""

from peft_vit.methods.method import Method

FULL = Method(
    learning_rate=2e-5,
    forward_passes=3,
    bytes_per_weight=16,
    why_not_peft="full fine-tuning changes every weight, so there is no adapter to export",
)
