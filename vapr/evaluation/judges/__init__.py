"""Judges: language models that review answers, and reviews that are stored already."""
