"""What may happen to scores between the patch tokens and the labels."""
