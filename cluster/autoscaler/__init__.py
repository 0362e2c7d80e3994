"""How many replica groups there should be."""
