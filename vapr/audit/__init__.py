"""Measures what gives the rejected answer away without the image."""
