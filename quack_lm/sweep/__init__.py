"""A sweep: a yaml file expanded to runs, each known by the hash of its resolved config, and trained N at a time.

    file: a sweep file as written -> plan: its cells, plan.json -> local: processes, or cluster: jobs -> run directories

A cell's directory depends on its own config only, so growing a sweep repeats nothing, and what a cell has reached is
read from its directory (cell), so any number of calls, also at the same time, share one state.
"""
