"""Fan-out: jobs become processes on devices. Nothing here imports torch."""
