"""What a setting's figures and tables compare, as its own figures.yaml says, and how methods are drawn in them."""

from typing import Final, NamedTuple

from undo.config.schema import Frozen, NonNegative, Share


class Look(NamedTuple):
    """How an unlearning method appears in figures."""

    title: str
    mark: str  # of its points: a matplotlib marker
    color: str  # of its models
    student_color: str  # of models distilled from them


# Colours of methods that name none, in turn, and of models distilled from theirs.
SPARE: Final = (("#E3186B", "#F3A0C2"), ("#8A5A00", "#D2B070"), ("#00B5BD", "#9BE5E7"))


class Alphas(Frozen):
    """Figure 5."""

    alphas: tuple[Share, ...]  # whose relearning curves are drawn


class UndoPoint(Frozen):
    """Figures 7 and 11: the UNDO models that stand beside the unlearning methods, at all their retain thresholds."""

    alpha: Share
    beta: NonNegative


class Shown(Frozen):
    """configs/<setting>/figures.yaml. Every key may be left out, and so may the file."""

    paper: str | None = None  # the experiment of the paper that the setting repeats, as report/paper.py names it
    like_for_like: bool = False  # at the paper's own size, so that its numbers can be subtracted from ours
    figures: tuple[str, ...] | None = None  # those of the setting's page; None: as the stages allow
    figure_5: Alphas | None = None  # None: every alpha
    figure_7: UndoPoint | None = None  # None: every UNDO model
