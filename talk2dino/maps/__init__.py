"""Maps: georeferenced files of any size, segmented by windows at a fixed ground scale."""
