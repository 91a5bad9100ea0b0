"""The stages, in the order of the pipeline. This is the only list of them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from undo.attacks import relearn
from undo.attacks import stage as attack
from undo.distill import undo, unlearn_and_distill
from undo.prepare_data import prepare
from undo.prepare_models import pretrain, pretrained
from undo.train.stage import Stage
from undo.unlearn import stage as unlearn

STAGES: Final[Mapping[str, Stage]] = MappingProxyType(
    {
        module.STAGE.name: module.STAGE
        for module in (prepare, pretrained, pretrain, unlearn, unlearn_and_distill, undo, relearn, attack)
    }
)
