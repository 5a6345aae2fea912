"""The steps of a run, dealt once and kept: written, read and checked."""
