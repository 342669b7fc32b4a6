"""The training loop and what belongs to a run: steps, checkpoints, metrics, export."""
