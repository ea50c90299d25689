"""The HTTP service of `python -m talk2dino.serve`, and Label Studio's protocol beside it."""
