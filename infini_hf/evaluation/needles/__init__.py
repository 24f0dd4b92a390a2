"""Needles in streams of any length: hidden at a depth, read once, asked for with the memory and with its controls."""
