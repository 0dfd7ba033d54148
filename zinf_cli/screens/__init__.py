"""What a user sees: a launch and all progress on stderr, the answer of every other command on stdout."""
