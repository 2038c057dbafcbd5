"""What surrounds the loop of `train.py`.

Here: `run` (start, count, save, finish), `inputs` (what is read first), `journal` (what is
recorded), sampling, generators, look-ahead, resuming, the lock of the run's directory.
May import every room but train and adapters. No formula of the paper stands here.
"""
