"""What is below RUN_DIR: writing it and reading it.

Here: metrics, console, samples, trackers, the directory of checkpoints and `latest`, the last line
of a log. May import config, data. Plain files on one rank: no models and no collectives.
"""
