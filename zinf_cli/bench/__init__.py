"""Measurements of drives and links, in the form the planner uses."""
