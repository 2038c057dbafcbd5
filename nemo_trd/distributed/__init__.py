"""Ranks, whoever uses them: joining, exchanging, failing together, being asked to stop.

Here: `process` (start, device, watch over failures), `exchange` (shares of work), `stop`.
May import config, records, generation's errors. Nothing of megatron-core, and nothing that knows
what is exchanged.
"""
