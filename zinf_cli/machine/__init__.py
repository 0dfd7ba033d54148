"""What a machine has and how fast it is: this one, measured or assumed, or another one."""
