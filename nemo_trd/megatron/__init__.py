"""Megatron models, their process groups, weights and checkpoints.

Importing the package makes megatron-core usable on a machine without CUDA; where CUDA exists
that does nothing.
"""

from nemo_trd.megatron import cpu_support

cpu_support.install()
