"""This package's model as a class of transformers: any attention with any stabilizer, for what no stock class has.

It has no cache: `generate` repeats the forward over everything so far for each token. Documents are not masked.
Axes: B batch, T time, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from quack_lm.attention.base import Attention
from quack_lm.config import check_section, instantiate
from quack_lm.model import Transformer

SECTIONS = ("model", "attention", "stabilizer")


class QuackLMConfig(PreTrainedConfig):
    """A config.json with `sections`: model, attention and stabilizer of a run's config."""

    model_type = "quack_lm"

    def __init__(self, sections: dict[str, dict[str, Any]] | None = None, **kwargs: Any) -> None:
        self.sections = sections or {}
        super().__init__(**kwargs)


class QuackLMForCausalLM(PreTrainedModel, GenerationMixin):
    """Tokens [B, T] -> logits [B, T, V], or the loss of given labels, by a `Transformer` of this package."""

    config_class = QuackLMConfig
    base_model_prefix = "model"

    def __init__(self, config: QuackLMConfig) -> None:
        super().__init__(config)
        # A config.json is untrusted: its classes are checked before any is imported.
        model, attention, stabilizer = (check_section(name, config.sections.get(name)) for name in SECTIONS)
        sizes, transform = instantiate(model), instantiate(stabilizer).qk_transform
        attention = {**attention, "backend": "sdpa"}  # which runs on any device
        self.model = Transformer(sizes, lambda: instantiate(attention, sizes.d_model, transform))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Attention):
            module.max_logits_H.fill_(-torch.inf)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where that is the embedding."""
        return self.model.head

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """All tokens so far, in each step."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` positions (0: of all), and with labels [B, T] their mean cross-entropy.

        `attention_mask` [B, T] is 0 for padding, on either side; other masks are refused.
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has {attention_mask.ndim} axes; QuackLM takes one of padding, [B, T]")
        # Rotary logits depend on distances alone, so padding only has to be invisible: another document.
        x_BTD = self.model.hidden(input_ids, None if attention_mask is None else attention_mask.long())
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.model.logits(x_BTD[:, kept])
        loss = None if labels is None else self.loss_function(logits_BTV, labels, self.model.sizes.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV)
