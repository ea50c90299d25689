"""Benchmarks of segmentation: images, label maps, class lists, and the protocol."""
