"""The web page of `python -m talk2dino.app`; only `page` knows Gradio."""
