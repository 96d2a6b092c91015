"""What the official SDK lacks: connecting, the admin client, the command line, tokenizers by name."""
