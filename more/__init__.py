"""Beyond the lesson: scripts that build on the five, which do not know them."""
