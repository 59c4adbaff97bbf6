"""One file a method; each ends in `register(...)`. Importing the catalogue imports them all."""
