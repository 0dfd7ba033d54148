"""What a command does, from its flags to its last line."""
