"""All solvers. A new one is a file in this folder and a line here."""

import compress.search.solvers.allocated
import compress.search.solvers.amp
import compress.search.solvers.even
import compress.search.solvers.heads
import compress.search.solvers.keep
import compress.search.solvers.layers
import compress.search.solvers.moa
import compress.search.solvers.priced
import compress.search.solvers.shares
import compress.search.solvers.streaming
import compress.search.solvers.uniform  # noqa: F401  (importing a solver registers it)
