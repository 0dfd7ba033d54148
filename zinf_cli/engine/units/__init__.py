"""What is fetched, computed and freed together: its layout, where its bytes lie, its life in a step."""
