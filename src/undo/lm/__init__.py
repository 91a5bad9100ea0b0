"""A causal language model as this project reads it: its input, its hidden states, its head, its size."""
