"""Label maps as annotations for labeling tools and trainers; one file per format."""
