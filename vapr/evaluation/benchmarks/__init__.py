"""Benchmarks, one in a file. To add one, write its file and name it here."""

from vapr.evaluation.benchmarks.amber_d import AMBER_D
from vapr.evaluation.benchmarks.amber_g import AMBER_G
from vapr.evaluation.benchmarks.benchmark import Benchmark
from vapr.evaluation.benchmarks.cv_bench import CV_BENCH
from vapr.evaluation.benchmarks.hallusionbench import HALLUSIONBENCH
from vapr.evaluation.benchmarks.judge_set import PACKAGED
from vapr.evaluation.benchmarks.llava_bench import LLAVA_BENCH
from vapr.evaluation.benchmarks.mathvista import MATHVISTA
from vapr.evaluation.benchmarks.mme import MME
from vapr.evaluation.benchmarks.mmmu import MMMU
from vapr.evaluation.benchmarks.mmstar import MMSTAR
from vapr.evaluation.benchmarks.naturalbench import NATURALBENCH
from vapr.evaluation.benchmarks.pope import POPE
from vapr.evaluation.benchmarks.repope import REPOPE
from vapr.evaluation.benchmarks.seed_bench import SEED_BENCH

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        *PACKAGED.values(),
        AMBER_D,
        AMBER_G,
        CV_BENCH,
        HALLUSIONBENCH,
        LLAVA_BENCH,
        MATHVISTA,
        MME,
        MMMU,
        MMSTAR,
        NATURALBENCH,
        POPE,
        REPOPE,
        SEED_BENCH,
    )
}
