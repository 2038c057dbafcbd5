"""Asking for samples: one protocol, `Generator`, and what implements it.

Here: `protocol`; `local` (Hugging Face generate in this process, `gumbel` noise that no batch
changes); `vllm` (servers: `pool`, `api`, `replica`); `weight_sync` with its `transport`
and binding of `nccl`.
May import config, data, models. Token ids in, token ids out: nothing of refinement is known here.
"""
