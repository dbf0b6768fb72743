"""`calibrate_`: quantize a model with an algorithm that uses the inputs of its layers.

run          calibrate_, block by block          <- start here
algorithms   how the codes and scales of one weight are chosen
chain        the blocks of a model, one at a time, with the activations between them
collect      statistics of the linears' inputs, by hooks
layer        one linear: quantize it and put the result into the model
equalize     SmoothQuant's equalization of norms and linears
state        finished blocks in a folder, to resume from
sensitivity  how much the model suffers from an error in each weight
"""

from fp6_compile.calibration.run import calibrate_

__all__ = ["calibrate_"]
