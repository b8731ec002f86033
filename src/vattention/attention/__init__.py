"""Kernels: what turns a query and a slot's K and V into attention, and the metadata that tells it where to look."""
