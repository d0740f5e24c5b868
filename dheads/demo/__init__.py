"""A page in the browser to try dheads on: `python -m dheads.demo`."""
