"""Ranks, whoever uses them."""
