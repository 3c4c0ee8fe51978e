"""quack_lm: pretraining language models with controlled changes to their attention logits."""

__version__ = "0.1.0"
