"""The sides of the speed benchmark: each module is a process of its own, in the environment of its library."""
