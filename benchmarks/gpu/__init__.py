"""``make gpu``: every check and measurement that needs a GPU, and their rehearsal without one."""
