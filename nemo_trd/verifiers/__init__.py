"""Verifiers: decide whether the final answer of a generated text is right.

A `Judge` gives the reason too, a `Verifier` only the verdict: True, False, or None. None means no
verdict (verifier "none", or the check failed or ran out of time): neither right nor wrong, so it
must be counted apart. Here: `math`, `code` in its `sandbox`, exact words. May import config. No
models and no prompts: two texts in, a judgement out.
"""
