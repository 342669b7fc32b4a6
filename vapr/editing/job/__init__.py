"""A job of editing: its folder, workers, leases, ledger and card."""
