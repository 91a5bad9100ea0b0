"""A whole setting, in order, to its table and figures: prepare -> pretrain -> unlearn -> distill, undo -> relearn.

uv run run_all.py demo [stage.key=value ...] [--only GLOB] [--with NAME] [--dry-run] [--force] [--tables]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("all")
