"""What people look at: progress, tables, reports, status and comparisons. Reads results; computes no metric."""
