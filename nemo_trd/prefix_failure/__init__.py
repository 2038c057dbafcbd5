"""python -m nemo_trd.prefix_failure: where rollouts go wrong, and what the teacher says there.

Here: choosing trajectories, measuring every position with both models, summing up, and saying it
in words. May import what megatron may, and toy. It reads a run and writes one file into it.
"""
