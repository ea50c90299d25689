"""What the command `train` adds to a run: callbacks by config, and what the store decides."""
