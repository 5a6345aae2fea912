"""Core: settings, files, records, hardware and process state; knows nothing of language models."""
