"""Invertible maps that make states easier to quantise."""
