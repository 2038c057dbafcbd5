"""python -m nemo_trd.doctor: can a run work in this place?

Here: checks of packages, devices, servers, the network and the launcher, each with its fix.
May import config, serve. Nothing that a run needs: it only looks.
"""
