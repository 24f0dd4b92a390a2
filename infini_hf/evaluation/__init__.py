"""Measurements: perplexity by position, recall of hidden facts."""
