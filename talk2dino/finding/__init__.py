"""Pictures of a feature store that words describe: a pass over its patches, records, a page."""
