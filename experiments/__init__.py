"""What turns a config into a recorded result: trials, the result store, sweeps, tracking and reports."""
