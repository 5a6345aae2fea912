"""Plan: parameters, FLOPs, memory, days and dollars, before anything is spent."""
