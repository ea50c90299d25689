"""Videos: frame by frame, with labels that do not flicker."""
