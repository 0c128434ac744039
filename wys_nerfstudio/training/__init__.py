"""A training run: phases, edits, checkpoints, history, resuming, interruption, several processes."""
