"""D(pi_T, pi_theta) along the labels: values and gradients, on shards of the vocabulary.

Here: `divergences` (one record each), `formulas` (their closed forms), `logits` (in fp32), `fused`
(chunks, gradients formed in the forward pass), `comparison` (all between logits and their
gradient, compiled on a GPU), `top_k` (the teacher's k most likely ids),
`vocab_shard` (what ranks exchange). May import config. Only tensors: no models, no trajectories.
"""
