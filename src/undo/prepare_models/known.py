"""The shapes of hub models whose cost is known before they are fetched."""

from typing import Final

from undo.lm.shape import CountedShape, Shape
from undo.prepare_models.reduced_gemma2 import ReducedGemma2


def _gemma3(hidden: int, intermediate: int, layers: int, window: int) -> CountedShape:
    """As in the config.json of google/gemma-3-*; the small ones have 4 heads of 256 and 1 for keys and values."""
    block = hidden * 256 * (2 * 4 + 2) + 3 * hidden * intermediate + 4 * hidden + 2 * 256
    return CountedShape(
        layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        heads=4,
        kv_heads=1,
        head_dim=256,
        vocab_size=262_144,
        block_parameters=block,
        other_parameters=hidden,
        head_parameters=262_144 * hidden,
        window=window,
        sliding_layers=layers - layers // 6,
    )


MODELS: Final[dict[str, Shape]] = {
    "gemma-3-270m": _gemma3(640, 2048, 18, 512),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 512),
    "gemma-2-2b": ReducedGemma2(hidden_size=2304, intermediate_size=9216, layers=26, head_dim=256),
}
