"""`python -m fastgen`, for `torchrun -m fastgen train ...` among others."""

import sys

from fastgen.cli import main

sys.exit(main())
