"""Student and teacher on megatron-core: models, groups, schedules, optimizer, weights, checkpoints.

Here: `student`, `teacher`, `loss_head` (hidden states to divergence), `model`, `schedule`, ...
May import algorithm, loss, models, records, distributed. No prompts, no generators: what happens
around a step is not known here. Importing the room makes megatron-core usable on a machine
without CUDA; where CUDA exists that does nothing.
"""

from nemo_trd.megatron import cpu_support

cpu_support.install()
