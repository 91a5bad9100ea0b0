"""Pretrain the reference model (all roles) and the oracle (all but the forget role): Section 3, Appendix A, Table 2.

uv run run_pretrain.py demo [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("pretrain")
