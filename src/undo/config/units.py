"""Numbers as people read them: durations and SI prefixes."""


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
