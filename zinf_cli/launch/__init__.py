"""From a plan to running ranks and back: spawn, watch, first failure, teardown."""
