"""What a user sees. Everything goes to stderr; stdout is for --json."""
