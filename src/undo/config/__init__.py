"""Configs: frozen typed blocks, the sweep language, and what every room may know. Nothing here imports torch."""
