"""Attention on codes: the oracle, the page walk, the streaming evaluation."""
