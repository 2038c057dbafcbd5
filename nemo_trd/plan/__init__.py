"""python -m nemo_trd.plan: memory, time and disk of a run, from its settings alone.

Here: shapes of models, activations, cost of a step, memory of a rank, checks before the queue,
advice and pictures. May import config, models, preflight. No torch: it runs on a login node.
"""
