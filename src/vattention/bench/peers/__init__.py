"""Workers, one for each engine that can be measured, ours among them; see `wire`.

They run as scripts, with the Python of the engine's own environment, so they cannot import this package (ours can).
"""
