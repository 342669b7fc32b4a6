"""Benchmarks, one in a file. To add one, write its file and name it here."""

from vapr.evaluation.benchmarks.benchmark import Benchmark
from vapr.evaluation.benchmarks.pope import POPE

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (POPE,)}
