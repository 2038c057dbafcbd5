"""Reads datasets and renders prompts; defines the types that flow through the loop.

Here: `types` (Prompt ... Trajectory), `prompts` (a dataset becomes prompts), `files`, `row`,
`chat`, `templates`. May import config, verifiers. No model and no ranks; nothing is dropped
without being counted.
"""
