"""Hydra finds its sweepers in packages below the namespace `hydra_plugins`: this is ours."""
