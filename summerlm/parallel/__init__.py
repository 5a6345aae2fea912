"""Parallel: how a model lies over devices and how its blocks are compiled."""
