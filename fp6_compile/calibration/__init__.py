"""`calibrate_`: quantize a model by what its layers see.

run       the function, block by block          <- start here
chain     blocks one at a time, activations between them
collect   statistics of the linears' inputs
"""

from fp6_compile.calibration.run import calibrate_

__all__ = ["calibrate_"]
