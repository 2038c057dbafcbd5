"""Trajectory-Refined Distillation (arXiv 2606.08432) for the Megatron/NeMo stack."""

__version__ = "0.1.0"
