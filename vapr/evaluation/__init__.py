"""Answers of models to benchmarks: generated, read, scored and compared."""
