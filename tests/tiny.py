"""Settings of a run that trains in seconds; tests add sources, tokenizer and folder."""

TINY = """
[model]
vocabulary = 300
width = 32
layers = 2
heads = 4
kv_heads = 2
head_dim = 8
mlp_hidden = 48
context = 32

[optim]
name = "muon"
peak_lr = 0.01
adam_lr = 0.003
warmup_tokens = 512
cooldown_fraction = 0.5

[data]
lanes = 4
workers = 0
held_out_fraction = 0.1

[train]
batch_tokens = 256
budget_tokens = 3072
precision = "float32"

[checkpoint]
every_steps = 4

[validation]
characters_per_source = 600
"""
