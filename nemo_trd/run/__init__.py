"""The surroundings of the loop of `train.py`.

Here: `run` (start, count, save, finish), `inputs` (what is read first), `journal` (what is
recorded), `session` (one run from inputs to end), sampling, generators, look-ahead, resuming, lock.
May import every room but train and adapters. No formula of the paper stands here.
"""
