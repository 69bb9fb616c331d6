"""What every script stands on and nobody needs to read."""
