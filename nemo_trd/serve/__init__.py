"""python -m nemo_trd.serve: being a vLLM server, and starting servers.

Here: `server` (processes and their logs), `node` (those of a Slurm node), `guard`, `api_key`,
`environment`, `open` (a generator on servers), `worker` (code that runs inside vLLM).
May import config, models, generation. No trainer: the server image has no megatron-core.
"""
