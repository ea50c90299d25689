"""Images, captions and label maps on disk; nothing here uses an encoder."""
