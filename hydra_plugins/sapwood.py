"""Our sweepers, where Hydra takes plugins from: it accepts none from outside of this package.

`framework.config.sweeping.register` makes them known; nothing has to be installed.
"""

from framework.config import search, sweepers


class Grid(sweepers.Grid):
    """`-m` alone: every combination of values."""


class Search(search.Search):
    """`-m sweep=optuna`: what is tried next follows from what was found."""
