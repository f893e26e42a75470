"""Logging, metrics and checks."""
