"""Prepare: text becomes a tokenizer, packed training and validation rows by role, and validation problems. Appendix A.

uv run run_prepare.py demo [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("prepare")
