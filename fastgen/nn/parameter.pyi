# For type checkers alone: when the program runs, this is the module torch.nn.parameter itself.
from torch.nn.parameter import *  # noqa: F403
