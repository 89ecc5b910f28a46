"""In which number format is the map evaluated? One file per method."""
