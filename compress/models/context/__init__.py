"""One long sequence in several processes: which tokens each has, and how it gets what it needs of the others."""
