"""Foundations without any mathematics: vectors, randomness, records, checks, errors."""
