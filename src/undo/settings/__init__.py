"""Whole settings: the list of stages, and the commands that run all of them."""
