"""What segmentations are scored on: images, label maps, class lists, and the protocol."""
