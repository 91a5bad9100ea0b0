"""Distill a teacher into a random student (Unlearn-and-Distill, Section 4, Table 6) or into the reference model
(oracle matching, Section 3, Table 3).

    uv run run_distill.py demo [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("distill")
