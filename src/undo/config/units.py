"""Numbers and tables as people read them: durations, SI prefixes, aligned columns."""

from collections.abc import Collection, Iterator, Sequence


def duration(seconds: float) -> str:
    """90 -> 1:30."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def si(value: float) -> str:
    """1.2e13 -> '12.0 T'."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.1f} {prefix}"
    return f"{value:.0f} "


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> Iterator[str]:
    """Rows of cells as lines, each column as wide as its widest cell. `right`: the columns that are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "   ".join(cells).rstrip()
