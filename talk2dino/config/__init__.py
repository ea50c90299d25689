"""Composing a command's config, checking it, and errors as one line."""
