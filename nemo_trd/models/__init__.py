"""What a Hugging Face directory is: its family, its files, its vocabulary. Without torch.

Here: `family` (facts of the supported families), `rules` (what can be built), `directory` (files
and their defects), `read`, `write`, `vocabulary` (ids that may be sampled), `served`.
May import config. No computation on weights.
"""
