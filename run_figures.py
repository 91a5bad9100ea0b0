"""The results table, the paper's figures and the paper's claims from finished runs.

uv run run_figures.py demo [fig3 fig4 fig5 claims] [--runs DIR]
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from undo.claims import as_markdown, check
from undo.cli import guarded
from undo.config import ConfigError
from undo.figures import FIGURES, draw
from undo.results import COLUMNS, Results, as_text, write_csv
from undo.run import write_atomically

NAMES = (*FIGURES, "claims")


def report(setting: str, names: list[str], runs: Path) -> None:
    """Print the table, write summary.csv and the figures."""
    results = Results.read(runs, setting)
    if not results.runs:
        raise ConfigError(f"{runs / setting} holds no finished run; make some with: uv run run_all.py {setting}")
    rows = results.table()
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for cells in as_text(rows):
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    write_csv(rows, runs / setting / "summary.csv")
    for line in [
        f"table: {runs / setting / 'summary.csv'}",
        *draw([name for name in names if name in FIGURES], results, runs / setting / "figures"),
    ]:
        console.print(line, highlight=False, soft_wrap=True)
    if "claims" in names:
        checked = check(results)
        claims = Table(box=None, pad_edge=False, title="the paper's claims, on these runs", title_justify="left")
        for column in ("section", "claim", "measured", "holds on", "verdict"):
            claims.add_column(column)
        for c in checked:
            claims.add_row(c.claim.section, c.claim.sentence, c.measured or "-", c.seeds, c.verdict)
        console.print(claims, highlight=False)
        write_atomically(runs / setting / "claims.md", as_markdown(checked))


def main() -> int:
    arguments = argparse.ArgumentParser(description="The results table and the paper's figures from finished runs.")
    arguments.add_argument("setting", help="for example demo")
    arguments.add_argument("figures", nargs="*", metavar="figure", help=f"of {', '.join(NAMES)} (default: all)")
    arguments.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs live (default: runs/)"
    )
    args = arguments.parse_intermixed_args()
    unknown = [name for name in args.figures if name not in (*NAMES, "all")]
    if unknown:
        raise ConfigError(f"there is no figure {unknown[0]!r}; there are: {', '.join(NAMES)}")
    report(args.setting, list(NAMES) if not args.figures or "all" in args.figures else args.figures, args.runs)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
