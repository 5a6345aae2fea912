"""Generate: prompts -> text."""
