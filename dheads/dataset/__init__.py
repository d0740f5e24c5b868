"""From raw corpora to prepared clips, and from prepared clips to memory."""
