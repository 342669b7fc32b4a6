"""Several models or runs, measured side by side."""
