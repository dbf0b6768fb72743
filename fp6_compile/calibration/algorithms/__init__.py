"""How codes and scales are chosen: one small file per algorithm, all behind interface.Algorithm.

    interface     a weight, a grid, a group size, statistics -> codes, scales, extras     <- start here
    statistics    what is known of a layer's inputs
    rtn           round to nearest
    clip          the scale with the least squared error: data-free, or weighted by the inputs
    gptq          error feedback through the inverse Hessian
    rounding      learned rounding
    lorc          low-rank factors of the error
    equalize      inputs against weights, folded into the norm between
    bias          the mean error into the bias
    search        exponent bits and clipping per layer (LLM-FP4), power exponents (NUPES)
    scales        powers of two; zero points
    grids         integers and powers, to compare formats with
    budget        which format each weight gets at a given size

Algorithms are objects and nest: LoRC(GPTQ(Weighted()), rank=16). `calibration.calibrate_` runs one over a model.
"""

from fp6_compile.calibration.algorithms.bias import BiasCorrection
from fp6_compile.calibration.algorithms.clip import Clip, Weighted
from fp6_compile.calibration.algorithms.gptq import GPTQ
from fp6_compile.calibration.algorithms.grids import Integer, Power
from fp6_compile.calibration.algorithms.interface import Algorithm, Needs, Quantized, output_error
from fp6_compile.calibration.algorithms.lorc import LoRC
from fp6_compile.calibration.algorithms.rounding import LearnedRounding
from fp6_compile.calibration.algorithms.rtn import RTN
from fp6_compile.calibration.algorithms.scales import Asymmetric, PowerOfTwo
from fp6_compile.calibration.algorithms.search import Search, nupes
from fp6_compile.calibration.algorithms.statistics import Statistics

__all__ = [
    "GPTQ",
    "RTN",
    "Algorithm",
    "Asymmetric",
    "BiasCorrection",
    "Clip",
    "Integer",
    "LearnedRounding",
    "LoRC",
    "Needs",
    "Power",
    "PowerOfTwo",
    "Quantized",
    "Search",
    "Statistics",
    "Weighted",
    "nupes",
    "output_error",
]
