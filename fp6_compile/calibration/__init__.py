"""`calibrate_`: quantize a model by what its layers see.

    run       the function, block by block          <- start here
    chain     blocks one at a time, activations between them
    collect   statistics of the linears' inputs
    layer     one linear: its weight, factors and bias into the model
    smooth    equalization of a block's norms and linears
    state     what is done so far, on the disk

What it does to a weight is in the algorithms room.
"""

from fp6_compile.calibration.run import calibrate_

__all__ = ["calibrate_"]
