"""The whole model as one Python object: pictures and words in, label maps out."""
