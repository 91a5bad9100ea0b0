"""Attacks: whatever tries to bring the forgotten capability back."""
