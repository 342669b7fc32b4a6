"""vapr: align vision-language models with preference pairs, packed and exact."""

__version__ = "0.1.0"
