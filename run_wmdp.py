"""WMDP: unlearn, noise, distill and attack a pretrained model. Section 6, Appendix D.2, Figures 8 and 11.

uv run run_wmdp.py wmdp_bio [model=HUB_ID_OR_FOLDER] [stage.key=value ...] [--stage STAGE] [--dry-run]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("wmdp")
