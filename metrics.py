"""lib.metrics and lib.verdicts under their old name."""
from lib.metrics import *  # noqa: F403
from lib.verdicts import *  # noqa: F403
