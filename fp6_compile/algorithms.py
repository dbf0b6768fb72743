"""Old name of fp6_compile.calibration.algorithms, kept for one version."""

import warnings

from fp6_compile.calibration.algorithms import *  # noqa: F403

warnings.warn(
    "fp6_compile.algorithms is called fp6_compile.calibration.algorithms now", DeprecationWarning, stacklevel=2
)
