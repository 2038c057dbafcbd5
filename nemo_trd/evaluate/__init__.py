"""python -m nemo_trd.evaluate: avg@k and pass@k on benchmarks, and of a student during its run.

Here: `source` (which model), drawing and judging samples, keeping them, `accuracy` and its
intervals. May import generation, serve, verifiers, megatron's export. Never trains.
"""
