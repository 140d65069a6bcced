"""Makes Hugging Face transformers cheaper head by head, and writes a checkpoint that loads anywhere."""

__version__ = "0.1.0"
