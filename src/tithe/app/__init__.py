"""What the command line runs: users of the public names like anybody else, with optional packages."""
