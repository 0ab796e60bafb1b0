"""How nbval reads this book: words and integers are compared exactly, decimal numbers with a tolerance.

stderr, HTML twins and pictures are not compared; each figure has a printed line that is.
"""

import math
import os
import re

RTOL = float(os.environ.get("BOOK_RTOL", 0.02))
# Four of 200 test rows: float32 training drifts between CPUs. Claims are asserts in the cells.
ATOL = float(os.environ.get("BOOK_ATOL", 0.02))
DECIMAL = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?")


class Text(str):
    """A str whose equality forgives small differences between decimal numbers."""

    def __eq__(self, other):
        mine, theirs = (re.sub(r"[ \-]{2,}", " ", DECIMAL.sub(" # ", str(t))).split() for t in (self, other))
        pairs = zip(DECIMAL.findall(self), DECIMAL.findall(str(other)))
        return mine == theirs and all(
            math.isclose(float(a), float(b), rel_tol=RTOL, abs_tol=ATOL) for a, b in pairs
        )

    def __ne__(self, other):
        return not self == other

    __hash__ = str.__hash__


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # an nbval notebook
        collector.skip_compare += ("stderr", "text/html", "image/svg+xml", "image/png")


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "cell"):  # an nbval cell
            clean = item.sanitize
            item.sanitize = lambda s, clean=clean: Text(clean(s)) if isinstance(s, str) else s
