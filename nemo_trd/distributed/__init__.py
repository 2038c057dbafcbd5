"""Ranks: joining, exchanging, failing together, stopping on request.

Here: `process` (start, device, watch over failures), `exchange` (shares of work), `stop`, `parent`.
May import config, records, generation's errors. Nothing of megatron-core, and no knowledge of
the exchanged content.
"""
