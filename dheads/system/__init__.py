"""Files, locks, devices, signals, processes and threads."""
