"""The tasks of `python -m talk2dino.convert`, one module each, of plain parameters."""
