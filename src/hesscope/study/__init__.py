"""A described, resumable run: configuration, steps, store."""
