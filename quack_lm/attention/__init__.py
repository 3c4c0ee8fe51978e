"""Attention variants, one file each, on one shared forward."""
