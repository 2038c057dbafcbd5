"""TRD inside recipes that people already have; see docs/recipes.md.

Each module translates between another package and `nemo_trd`, whose algorithm stays where it is.
May import every room; no room imports it. Importing `nemo_trd` imports none of those packages,
whether they are installed or not.
"""
