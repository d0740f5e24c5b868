"""Raw corpora to prepared clips, and prepared clips to memory."""
