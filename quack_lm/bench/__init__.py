"""Benchmarks of training steps: variants in turn, in one process, as ratios to a baseline among them.

suites (what is compared) --step, peers--> something with a `step` --rounds--> a table, and a line of JSON per round
                                                                --trace--> a trace of torch's profiler
"""
