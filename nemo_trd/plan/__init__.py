"""What a run will need, from its settings and two config.json: memory, FLOPs, time, disk.

Imports neither torch nor Megatron, so that it answers on any machine in a second.
"""
