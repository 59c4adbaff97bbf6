"""One harness for every method: the same text, windows, reference and definitions."""
