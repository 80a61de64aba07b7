"""`python -m fastgen.cli`, for `torchrun -m fastgen.cli train ...` among others."""

import sys

from fastgen.cli import main

sys.exit(main())
