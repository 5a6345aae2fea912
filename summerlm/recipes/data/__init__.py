"""Flows over the data of a run: pin, look at, deal, tokenize."""
