"""Reals to codes and parameters; they know no paper and no cache."""
