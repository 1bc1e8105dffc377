"""What the project promises of itself in time and memory, measured."""
