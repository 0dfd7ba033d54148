"""zinf beside what a user would pick instead: `make bench`, `make bench-peer`. Results are in README.md."""
