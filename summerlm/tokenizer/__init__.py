"""Tokenizer: text to ids and back, byte for byte; special ids never come from text."""
