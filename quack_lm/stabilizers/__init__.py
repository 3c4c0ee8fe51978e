"""Methods that tame attention logits, one file each."""
