"""History of training runs: record, store, compare, report."""
