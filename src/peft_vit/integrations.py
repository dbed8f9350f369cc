"""Adaptive ranks and low-bit weights in transformers' Trainer, by callbacks.

    trainer = Trainer(..., callbacks=[AdaLoRACallback(controller)])

Trainer clips before it calls them: with another `max_grad_norm` than 0 a step with large gradients counts for less in
scores, and adapters' gradients are scaled after clipping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_vit.base.errors import UserError
from peft_vit.base.extras import require_extra

require_extra("transformers", "peft_vit.integrations")
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

if TYPE_CHECKING:
    from peft_vit.core.allocation.adalora_controller import AdaLoRAController
    from peft_vit.core.training.qa_lora import QALoRATrainer


class AdaLoRACallback(TrainerCallback):
    """Lets a controller score, decide and change the ranks while a Trainer trains.

    Args:
        controller: of the Trainer's model, or of a model within it.
    """

    def __init__(self, controller: AdaLoRAController) -> None:
        self.controller = controller
        self._scores: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Refuse (UserError) what can't follow a change of rank: other optimizers, torch.compile, several processes."""
        if args.torch_compile:  # which wraps the model where a callback does not see it
            message = "ranks can't change here: torch.compile continues with the old tensors; train without it"
            raise UserError(message, field="torch_compile")
        self.controller.attach(given["model"], given["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Score the gradients of the step."""
        self._scores = self.controller.update_importance_scores(given["model"], state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Decide the ranks, where that is due, and resize tensors and moments."""
        ranks = self.controller.reallocate_ranks(self._scores, state.global_step + 1)
        self.controller.apply_ranks(given["model"], given["optimizer"], ranks)


class QALoRACallback(TrainerCallback):
    """Moves the schedule of quantization on while a Trainer trains.

    Args:
        quantizer: of the Trainer's model, or of a model within it.
    """

    def __init__(self, quantizer: QALoRATrainer) -> None:
        self.quantizer = quantizer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Scale the adapters' gradients."""
        self.quantizer.before_step(given["model"], state.global_step + 1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Take the next step's share of the quantized weights; at the schedule's end the float ones are freed."""
        self.quantizer.after_step(given["model"], given["optimizer"], state.global_step + 1)
