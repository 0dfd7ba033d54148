"""What is asked for: a recipe, the file it stands in, the hosts it is to run on."""
