"""`python -m fp6_compile.cli` is `fp6-compile`."""

import sys

from fp6_compile.cli import main

sys.exit(main())
