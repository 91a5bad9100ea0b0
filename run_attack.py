"""Attacks of every kind: finetune, LoRA, quantise, prune, merge, perturb, ablate, one after another or alone.

uv run run_attack.py demo --with attacks [key=value ...] [--only GLOB] [--dry-run] [--force] [--runs DIR]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("attack")
