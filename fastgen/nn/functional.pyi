# For type checkers alone: when the program runs, this is the module torch.nn.functional itself.
from torch.nn.functional import *  # noqa: F403
