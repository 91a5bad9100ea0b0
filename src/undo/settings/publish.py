"""The results table, the paper's figures and the paper's claims from finished runs.

Without names: everything, and report.md, one page that holds it all.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import get_args

from undo.config.files import write_atomically
from undo.config.mistakes import ConfigError
from undo.config.schema import validate
from undo.config.sweep import read_yaml
from undo.experiments.remedy import command_of, remedy, setting_folder
from undo.report.claims import HEADER, as_rows, check
from undo.report.figures import FIGURES, draw, figures_of
from undo.report.figures.missing import Missing
from undo.report.paper import EXPERIMENTS
from undo.report.report import report, without_robustness
from undo.results.curves import COLUMNS, curves
from undo.results.matrix import COLUMNS as MATRIX_COLUMNS
from undo.results.matrix import matrix
from undo.results.results import Results
from undo.results.shown import SPARE, Look, Shown
from undo.results.text import as_text, write_csv
from undo.settings.stages import STAGES
from undo.unlearn import UnlearningMethod
from undo.unlearn.method import Method

NAMES = (*FIGURES, "claims")
FILE = "figures.yaml"  # in a setting's folder of configs


def read(runs: Path, setting: str, shown: Shown | None = None) -> Results:
    """The results of a setting. `shown`: what its figures compare; None: as its own figures.yaml says."""
    return Results.read(runs, setting, tuple(STAGES), shown or shown_in(setting_folder(setting)), looks())


def shown_in(folder: Path | None) -> Shown:
    """What a setting's figures.yaml says, or what goes without one. Raises ConfigError for a mistake in it."""
    if folder is None or not (folder / FILE).exists():
        return Shown()
    file = folder / FILE
    shown = validate(Shown, read_yaml(file), str(file))
    for key, given, known in (("paper", [shown.paper], EXPERIMENTS), ("figures", shown.figures or (), FIGURES)):
        if unknown := [name for name in given if name is not None and name not in known]:
            raise ConfigError(f"{file}: {key}: there is no {unknown[0]!r}; there are: {', '.join(known)}")
    return shown


def looks() -> dict[str, Look]:
    """How each unlearning method appears in figures, by its name."""
    kinds: tuple[type[Method], ...] = get_args(get_args(UnlearningMethod)[0])
    spare, found = cycle(SPARE), dict[str, Look]()
    for kind in kinds:
        name = kind.model_fields["name"].default
        color, student_color = (kind.color, kind.student_color) if kind.color else next(spare)
        found[name] = Look(kind.title or name, kind.mark, color, student_color or color)
    return found


def publish(folder: Path, runs: Path, names: list[str] | None = None, out: Path | None = None) -> None:
    """Print the table, write summary.csv and what is named into `out` (default: the setting's folder of runs).

    folder: of the setting's YAML files; its name is the setting's.
    """
    from rich.console import Console
    from rich.table import Table

    setting = folder.resolve().name
    results = read(runs, setting, shown_in(folder))
    if not results.runs:
        damaged = f"; {len(results.unread)} cannot be read, as {results.unread[0]}" if results.unread else ""
        raise ConfigError(f"{runs / setting} holds no finished run{damaged}; make some with: {command_of(setting)}")
    out = runs / setting if out is None else out
    rows = results.table()
    wanted = figures_of(results) if names is None else [name for name in names if name in FIGURES]
    checked = check(results)
    with _writing_to(out):
        figures, lacking = draw(wanted, results, out / "figures")
        missing = not_drawn(setting, lacking) + [f"left out: {line}" for line in results.unread]
        write_csv(rows, results.columns, out / "summary.csv")
        write_csv(curves(results), COLUMNS, out / "curves.csv")
        if (attacked := matrix(results)) is not None:
            write_csv(attacked.rows(), MATRIX_COLUMNS, out / "attacks.csv")
        if names is None:
            write_atomically(out / "report.md", report(results, checked, figures, missing))
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    table = Table(box=None, pad_edge=False)
    for column in results.columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for cells in as_text(rows):
        table.add_row(*cells)
    console.print(table)
    for line in without_robustness(results):
        console.print(line, highlight=False, soft_wrap=True)
    if "claims" in (names or NAMES):
        claims = Table(box=None, pad_edge=False, title="the paper's claims, on these runs", title_justify="left")
        for column in HEADER:
            claims.add_column(column)
        for cells in as_rows(checked):
            claims.add_row(*cells)
        console.print(claims, highlight=False)
    lines = [f"table: {out / 'summary.csv'}", f"curves: {out / 'curves.csv'}"]
    lines += [f"attacks: {out / 'attacks.csv'}"] if attacked is not None else []
    lines += (f"{path.stem}: {path.with_suffix('.pdf')}, .png" for path in figures)
    if names is None:
        lines.append(f"report: {out / 'report.md'}")
    for line in [*lines, *missing]:
        console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    """Make the folder. Raises ConfigError for what cannot be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        place, reason = error.filename or out, error.strerror or error
        raise ConfigError(f"{place}: cannot be written ({reason})\nchoose another place with --out DIR") from None


def not_drawn(setting: str, lacking: Mapping[str, Missing]) -> list[str]:
    """One line for each figure that lacks something: what, and the command that makes it."""
    return [
        f"{name}: not drawn: {lack.what} is missing; {remedy(setting, *lack[1:])}" for name, lack in lacking.items()
    ]


def main() -> int:
    arguments = argparse.ArgumentParser(description="The results table and the paper's figures from finished runs.")
    arguments.add_argument("setting", help="for example demo; or the folder of its YAML files")
    arguments.add_argument("figures", nargs="*", metavar="figure", help=f"of {', '.join(NAMES)} (default: all)")
    arguments.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs live (default: runs/)"
    )
    arguments.add_argument(
        "--out", type=Path, metavar="DIR", help="where figures, table and report go (default: runs/<setting>)"
    )
    args = arguments.parse_intermixed_args()
    unknown = [name for name in args.figures if name not in (*NAMES, "all")]
    if unknown:
        raise ConfigError(f"there is no figure {unknown[0]!r}; there are: {', '.join(NAMES)}")
    folder = Path(args.setting)
    if not folder.is_dir():
        folder = setting_folder(args.setting) or folder
    publish(folder, args.runs, None if not args.figures or "all" in args.figures else args.figures, args.out)
    return 0
