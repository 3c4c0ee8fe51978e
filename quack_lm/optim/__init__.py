"""Optimizers, learning-rate schedules, and which parameter goes where."""
