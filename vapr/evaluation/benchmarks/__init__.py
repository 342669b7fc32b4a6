"""Benchmarks, one in a file. To add one, write its file and name it here."""

from vapr.evaluation.benchmarks.benchmark import Benchmark
from vapr.evaluation.benchmarks.cv_bench import CV_BENCH
from vapr.evaluation.benchmarks.mathvista import MATHVISTA
from vapr.evaluation.benchmarks.mmmu import MMMU
from vapr.evaluation.benchmarks.mmstar import MMSTAR
from vapr.evaluation.benchmarks.pope import POPE
from vapr.evaluation.benchmarks.seed_bench import SEED_BENCH

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        CV_BENCH,
        MATHVISTA,
        MMMU,
        MMSTAR,
        POPE,
        SEED_BENCH,
    )
}
