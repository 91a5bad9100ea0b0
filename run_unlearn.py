"""Unlearn: suppress the forget role in a reference model. Section 4, Appendix B.1, Table 5.

uv run run_unlearn.py demo [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("unlearn")
