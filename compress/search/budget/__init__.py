"""What a plan may cost: the kinds of budget, one file each, and the recipe's budget, which is made of all of them."""

import compress.search.budget.active
import compress.search.budget.bytes_read
import compress.search.budget.decode_time
import compress.search.budget.density
import compress.search.budget.flops
import compress.search.budget.kv
import compress.search.budget.kv_bound
import compress.search.budget.parameters  # noqa: F401  (importing a kind registers it)
