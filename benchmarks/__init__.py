"""Models, data sets and measurements. Needs the `bench` extra."""
