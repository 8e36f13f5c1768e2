"""Random-matrix predictions; knows no networks."""
