"""Evaluations: config blocks that are loaded once for a run and then called with the model -> named numbers.

Every evaluation reports `retain` and `forget` and says whether larger is better. All comparisons go by that.
"""

from typing import Annotated

from pydantic import Field

from undo.evaluate.accuracy import Accuracy
from undo.evaluate.cross_entropy import TokenCrossEntropy
from undo.evaluate.multiple_choice import MultipleChoice

Evaluation = Annotated[Accuracy | TokenCrossEntropy | MultipleChoice, Field(discriminator="name")]
