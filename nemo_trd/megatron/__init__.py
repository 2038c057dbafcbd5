"""Student and teacher on megatron-core: models, groups, schedules, optimizer, weights, checkpoints.

Here: `student`, `teacher`, `loss_head` (hidden states to divergence), `model`, `schedule`, ...
May import algorithm, loss, models, records, distributed. No prompts, no generators: what happens
around a step is not known here. Importing the room makes megatron-core usable without CUDA
(`cpu_support`, which does nothing where CUDA exists) and with torch's Adam (`torch_adam`).
"""

from nemo_trd.megatron import cpu_support

cpu_support.install()

from nemo_trd.megatron import torch_adam  # noqa: E402  (megatron-core can be imported from here on)

torch_adam.install()
