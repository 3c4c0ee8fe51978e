"""Sections and figures that are only about the paper (arXiv 2511.21377); quack_lm.report takes them as arguments."""
