"""quack_lm: pretraining language models with controlled changes to their attention logits."""
