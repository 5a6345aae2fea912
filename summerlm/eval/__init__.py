"""Eval: how good a model is, beside what a 5-gram and a compressor make of the same text."""
