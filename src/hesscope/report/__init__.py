"""Figures and the HTML page: they read records only, never a model."""
