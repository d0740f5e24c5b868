"""How good generated videos are."""
