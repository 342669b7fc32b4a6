"""Scores as pure functions of predictions. No torch."""
