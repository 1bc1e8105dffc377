"""How the trials of a sweep get run: composed, planned, driven here, by worker processes, or by a cluster."""
