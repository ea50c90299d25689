"""From captioned images to the shards of a feature store."""
