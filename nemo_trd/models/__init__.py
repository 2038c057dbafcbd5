"""Model directories of Hugging Face: family, files, vocabulary. Without torch, but for `write`.

Here: `family` (records of the supported families), `rules` (what can be built), `directory` (files
and their defects), `read`, `write`, `vocabulary` (ids that may be sampled), `served` (a teacher
on servers), `dtypes`. May import config. No computation on weights.
"""
