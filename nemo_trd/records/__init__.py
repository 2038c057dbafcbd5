"""The files below RUN_DIR: writing and reading them.

Here: metrics, console, samples, trackers, the directory of checkpoints and `latest`, the last line
of a log. May import config, data. Plain files on one rank: no models and no collectives.
"""
