"""The section of a report about attacks of every kind: the matrix, each model's worst case, and UNDO's ordering."""

from collections.abc import Iterator

from undo.results.matrix import KEPT, RECOVERED, Matrix, matrix
from undo.results.results import Results
from undo.results.text import markdown


def attacks(results: Results) -> str | None:
    """Tables as Markdown; None where no attack but relearning was made."""
    found = matrix(results)
    if found is None:
        return None
    seeds = sorted({cell.model.seed for cell in found.cells})
    return "\n".join(
        [
            f"Forget / retain {found.unit} at the end of each attack, by its worst adversary; {_over(seeds)}. "
            f"In brackets: on most seeds less than {KEPT:.0%} of the model's retain performance is left.\n",
            markdown(("attack", *found.models, "UNDO in order of α"), _rows(found)),
            "UNDO in order of α: whether less is elicited at each larger α, from the unlearned model on. -: the attack "
            "elicits next to nothing from any of them.\n",
            markdown(("model", "worst attack", "of those that keep retain", "paired with unlearned"), _worst(found)),
            f"Worst attack: forget / retain. Keep retain: at least {KEPT:.0%} of the attacked model's. Paired with "
            "unlearned: what the worst attack elicits from the model, less what it elicits from the model that UNDO "
            "starts from, on the same problems; 95 % by bootstrap over problems, of which each has its mean over "
            f"{len(seeds)} seed{'s' * (len(seeds) > 1)}; training anew is not in it. broken: below "
            f"{RECOVERED:.0%} of its teacher's retain performance before any attack.\n",
        ]
    )


def _over(seeds: list[int]) -> str:
    return f"seed {seeds[0]} alone (1 seed)" if len(seeds) == 1 else f"medians over {len(seeds)} seeds"


def _rows(found: Matrix) -> Iterator[tuple[str, ...]]:
    for attack in found.attacks:
        ordered = found.in_order(attack)
        yield (
            attack,
            *(_cell(found, model, attack) for model in found.models),
            "-" if ordered is None else "yes" if ordered else "no",
        )


def _cell(found: Matrix, model: str, attack: str) -> str:
    if not found.at(model, attack):
        return "not run"
    pair = found.elicited(model, attack)
    if pair is None:
        return "diverged"
    text = f"{pair[0]:.3f} / {pair[1]:.3f}"
    return f"({text})" if found.costs_retain(model, attack) else text


def _worst(found: Matrix) -> Iterator[tuple[str, ...]]:
    for model in found.models:
        cells = []
        for kept in (False, True):
            entry = found.worst(model, kept)
            if entry is None:
                cells.append("none")
                continue
            ended, seeds = len(found.ended(model, entry[0], kept)), len(found.at(model, entry[0]))
            some = f" ({ended} of {seeds} seeds)" * (ended < seeds)
            cells.append(f"{entry[0]}: {entry[1]:.3f} / {entry[2]:.3f}{some}")
        start = found.series[0] if found.series else None
        apart = None if start in (None, model) else found.paired(model, start)
        yield model + ", broken" * found.broken(model), *cells, "-" if apart is None else str(apart)
