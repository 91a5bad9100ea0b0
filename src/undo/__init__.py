"""Distillation Robustifies Unlearning: unlearn, noise, distill, attack. Importing this costs nothing: no torch here."""
