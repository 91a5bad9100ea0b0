"""The base stage: fetch the pretrained model that everything else starts from. Appendix D.2.

uv run run_base.py wmdp_bio [model=HUB_ID_OR_FOLDER] [--dry-run] [--force] [--runs DIR]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("base")
