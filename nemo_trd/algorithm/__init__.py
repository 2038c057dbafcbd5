"""The paper, as pure functions: from prompts and samples to micro-batches.

Here: refinement prompts and their token budget, which rewrites are accepted, pairing of contexts,
micro-batches, how y_o and y_r differ. May import config, data, verifiers. No files, no ranks, no
models: the same arguments give the same result on every rank.
"""
