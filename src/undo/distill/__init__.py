"""Distillation with KL: Unlearn-and-Distill, oracle matching and UNDO."""
