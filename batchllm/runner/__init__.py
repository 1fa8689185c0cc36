"""Running a batch: index arrays, the torch runner, and a fake one for tests and simulation."""
