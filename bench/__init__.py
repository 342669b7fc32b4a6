"""Benchmarks: one script per operation, and training steps against TRL. Not part of the installed package."""
