"""Requests: who runs next, on which tokens, and what comes out. Knows lengths and slots, never pages."""
