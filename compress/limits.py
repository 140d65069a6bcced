"""The largest numbers that a recipe may ask for: far above what is of use, and small enough to be refused in time.

A slip such as `count: 99999999999999` is then reported when the recipe is read, and not after memory has run out.
"""

LONGEST = 2**24  # tokens of an input
DOCUMENTS = 10_000  # of one task and length
DOCUMENT_TOKENS = 2**26  # of all documents of a list together
BATCH = 65_536  # sequences at once
PROCESSES = 4_096  # that share a sequence
STEPS = 1_000_000  # of a training
SEQUENCES = 10**8  # of all steps of a training together
MINUTES = 100_000.0  # 70 days
SECONDS = 60 * MINUTES
FACTOR = 1e6  # weights, scales and rates
BYTES = 10**15
SEED = 2**32 - 1  # the largest that numpy takes
ENTRIES = 64  # of a list of lengths, sizes or shares

SHOWN_LENGTHS = (1024, 2048, 4096, 8192, 32768, 131072)  # tokens at which costs of a plan are shown
