"""A decode step in few calls: the graph whose layers run as generated kernels around their attention."""
