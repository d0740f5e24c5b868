"""Files, devices, processes and threads."""
