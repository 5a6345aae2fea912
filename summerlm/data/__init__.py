"""Documents to batches: sources, lanes, mixture, packing and the loader."""
