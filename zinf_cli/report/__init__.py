"""One page of curves and pictures of a run, or of several over each other, from what lies in their folders."""
