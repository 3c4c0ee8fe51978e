"""Models for transformers: which of its classes computes what a model computes, and one that computes any of them.

    import quack_lm.hf
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)

Importing this package registers the class `QuackLMForCausalLM`, which directories need that say `"model_type":
"quack_lm"`. For those of a stock class, which `quack-lm export` prefers, transformers alone is enough.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from quack_lm.hf.model import QuackLMConfig, QuackLMForCausalLM

AutoConfig.register(QuackLMConfig.model_type, QuackLMConfig, exist_ok=True)
AutoModelForCausalLM.register(QuackLMConfig, QuackLMForCausalLM, exist_ok=True)

__all__ = ["QuackLMConfig", "QuackLMForCausalLM"]
