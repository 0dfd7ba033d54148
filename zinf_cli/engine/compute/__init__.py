"""Forward and backward: the tape, the sweep, what is kept between them, and the survey of a model."""
