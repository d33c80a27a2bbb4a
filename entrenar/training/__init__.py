"""Training runs: configuration, the loop, checkpoints, what is shown on the way, and the picture at the end."""
