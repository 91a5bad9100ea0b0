"""Relearning attacks: finetune a model on the forget role, over learning rates. Section 2, Tables 4 and 12.

uv run run_relearn.py demo [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("relearn")
