"""The audit: how far the rejected answer gives itself away without the image."""
