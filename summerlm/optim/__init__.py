"""Optim: gradients -> weights; parameter groups, AdamW, Muon and the schedule of their rate."""
