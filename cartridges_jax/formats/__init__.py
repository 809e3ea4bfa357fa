"""Model files: the GGUF format, and where files come from."""
