"""How codes and scales are chosen: one small file per algorithm, all behind interface.Algorithm.

    interface     a weight, a grid, a group size, statistics -> codes, scales, extras     <- start here
    statistics    what is known of a layer's inputs
    rtn           round to nearest
    clip          the scale with the least squared error: data-free, or weighted by the inputs
    gptq          error feedback through the inverse Hessian

Algorithms are objects and nest: GPTQ(Weighted()). `calibrate.calibrate_` runs one over a model.
"""

from fp6_compile.algorithms.clip import Clip, Weighted
from fp6_compile.algorithms.gptq import GPTQ
from fp6_compile.algorithms.interface import Algorithm, Needs, Quantized, output_error
from fp6_compile.algorithms.rtn import RTN
from fp6_compile.algorithms.statistics import Statistics

__all__ = ["GPTQ", "RTN", "Algorithm", "Clip", "Needs", "Quantized", "Statistics", "Weighted", "output_error"]
