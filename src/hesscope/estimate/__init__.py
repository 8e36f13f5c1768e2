"""Randomized linear algebra with error bars, and its dense twins."""
