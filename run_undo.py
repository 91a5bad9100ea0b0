"""UNDO: distill an unlearned model into a noised copy of itself. Section 5, Appendix C.

uv run run_undo.py demo [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("undo")
