"""Benchmarks of training steps: variants in turn, in one process, as ratios to the first of them.

suites (what is compared) --step, peers--> something with a `step` --rounds--> a table, and a line of JSON per round
"""
