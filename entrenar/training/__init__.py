"""Training runs: configuration, the loop, checkpoints, what is shown, and the picture at the end."""
