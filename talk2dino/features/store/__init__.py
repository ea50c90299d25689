"""The feature store: sharded HDF5, written once, memory-mapped by its readers."""
