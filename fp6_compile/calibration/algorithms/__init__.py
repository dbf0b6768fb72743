"""Algorithms that choose the codes and scales of one weight.

    base              what an algorithm gets and returns; RTN, round to nearest               <- start here
    statistics        sums over a layer's inputs: mean, E[x^2], largest magnitude, Hessian
    scales            Clip, Weighted: the scale with the least squared error; PowerOfTwo
    gptq              GPTQ: error feedback through the inverse Hessian
    learned_rounding  LearnedRounding: up or down for each weight, by gradient descent (AdaRound)
    corrections       LoRC: low-rank factors of the error; BiasCorrection: the mean error goes into the bias
    search            Search: the best of several formats for each weight (LLM-FP4)

An algorithm is a frozen dataclass, and most refine another one: LoRC(GPTQ(Weighted()), rank=16). `calibrate_` runs one over
a model.
"""

from fp6_compile.calibration.algorithms.base import RTN, Algorithm, Needs, Quantized, Refinement, output_error
from fp6_compile.calibration.algorithms.corrections import BiasCorrection, LoRC
from fp6_compile.calibration.algorithms.gptq import GPTQ
from fp6_compile.calibration.algorithms.learned_rounding import LearnedRounding
from fp6_compile.calibration.algorithms.scales import Clip, PowerOfTwo, Weighted
from fp6_compile.calibration.algorithms.search import Search
from fp6_compile.calibration.algorithms.statistics import Statistics

__all__ = [
    "GPTQ",
    "RTN",
    "Algorithm",
    "BiasCorrection",
    "Clip",
    "LearnedRounding",
    "LoRC",
    "Needs",
    "PowerOfTwo",
    "Quantized",
    "Refinement",
    "Search",
    "Statistics",
    "Weighted",
    "output_error",
]
