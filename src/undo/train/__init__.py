"""THE training loop, the gradient it takes, and what every training stage needs around it."""
