"""Measurement: what the command line runs to show what this package does on this machine. Loaded when asked for."""
