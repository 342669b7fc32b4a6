"""Files to PreferencePair: sources, formats, checks, images. Knows no torch."""
