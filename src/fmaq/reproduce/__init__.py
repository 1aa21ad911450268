"""Experiments that train, or time, a grid of accumulators and estimators, and show what they found."""
