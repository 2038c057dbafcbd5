"""The toy task: arithmetic chains whose errors can be located, and two models that learn it.

Here: `task`, `derivations` (the orders in which a problem may be worked out), `tokenizer`, `rows`,
`errors`, `warm_start` (a student that errs, a teacher that can rewrite). May import config, data,
algorithm's `change`. Nothing of it is needed by a real run.
"""
