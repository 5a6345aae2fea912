"""Files of any origin -> rows."""
