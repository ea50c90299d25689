"""Pictures, captions and label maps as they lie on disk; nothing here knows an encoder."""
