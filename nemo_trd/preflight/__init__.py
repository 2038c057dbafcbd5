"""Rules that refuse a run before a model is built: all broken ones are told at once.

Here: `models` (student, teacher, tokenizers), `machine` (directories, devices, packages),
`batch` (ranks and batch sizes), `server_lengths`. May import config, models, verifiers, records.
Nothing is written and nothing that exists is changed.
"""
