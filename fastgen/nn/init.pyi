# For type checkers alone: when the program runs, this is the module torch.nn.init itself.
from torch.nn.init import *  # noqa: F403
