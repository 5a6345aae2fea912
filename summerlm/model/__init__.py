"""Model: ids -> hidden states -> loss, and the settings that shape them."""
