"""What a run will need, in bytes and by tier, before it starts."""
