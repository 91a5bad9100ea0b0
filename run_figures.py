"""The results table, the paper's figures and the paper's claims from finished runs.

uv run run_figures.py demo [fig3 fig4 fig5 claims] [--runs DIR] [--out DIR]
"""

from undo.settings.command import call

if __name__ == "__main__":
    call("figures")
