"""What `train` adds to the module: callbacks, resume, result files, trackers, word embeddings."""
