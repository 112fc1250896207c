"""A constraint on one row that is checked on the host, such as a grammar."""

# Shapes: V vocabulary

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """The ids that one row may write next.

    Each row needs an object of its own, since it keeps the row's state. A compiled constraint over
    all rows is the ``constraint`` of `generate` instead.
    """

    def allowed(self) -> np.ndarray:
        """Return which ids may come next, bool (V,).

        End ids are among them only where the text may end. A shorter array forbids the ids past its
        end. The row ends with "stop" if nothing is allowed.
        """
        ...

    def accept(self, token: int) -> None:
        """Note that ``token`` was written. Not called for the end token."""
        ...
