"""Which model fits on which card, modelled by lm/memory.py; nothing here was measured on a card.

uv run python benchmarks/fits.py
"""

from typing import Final

from undo.config.schema import Execution, Training
from undo.lm.memory import options
from undo.prepare_models.known import MODELS

CARDS: Final = {24: 23.6, 40: 39.4, 80: 79.1, 141: 139.8}  # the GB of their names, and the GiB that CUDA reports


def table(length: int = 1024, batch_rows: int = 8) -> str:
    """Modelled: for each model and kind of run the least change to its config with which it fits on a card."""
    from undo.unlearn import SAM

    cfg = Training(
        steps=1, batch_rows=batch_rows, learning_rate=1e-5, evaluate_every=1, precision="bf16", warmup_steps=0
    )
    lines = [
        f"bf16 autocast, fp32 weights, batches of {batch_rows} rows of {length} tokens; modelled, not measured",
        f"{'model':14}{'run':32}{'as it is':>9}   " + "".join(f"{card:>3} GB{'':24}" for card in CARDS).rstrip(),
    ]
    for name, shape in MODELS.items():
        for kind, frozen, held in (
            ("finetuning", (), 0),
            ("with a teacher or reference", (shape,), 0),
            ("SAM, with a reference", (shape,), SAM(ascent="total").held_per_weight),
        ):
            found = list(options(shape, cfg, Execution(), length, frozen=frozen, held=held))
            cells = []
            for gib in CARDS.values():
                fitting = next((option for option in found if option.memory.total <= gib * 2**30), None)
                cells.append("does not fit" if fitting is None else _short(fitting.keys))
            total = f"{found[0].memory.total / 1e9:.0f} GB"
            lines.append(f"{name:14}{kind:32}{total:>9}   " + "".join(f"{cell:30}" for cell in cells).rstrip())
    return "\n".join(lines)


def _short(keys: str) -> str:
    names = {"execution.gradient_checkpointing=true": "checkpointing", "training.optimizer=adamw_8bit": "8-bit"}
    parts = [names.get(key, key.removeprefix("execution.").replace("micro_rows=", "rows ")) for key in keys.split()]
    return ", ".join(parts) or "as it is"


if __name__ == "__main__":
    print(table())
