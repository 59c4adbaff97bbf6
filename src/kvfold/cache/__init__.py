"""The packed cache: torch only, no model library."""
