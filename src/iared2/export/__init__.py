"""A model -> files for other runtimes: static graphs, and the parts of an adaptive batch."""
