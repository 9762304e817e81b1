"""A stand-in for Dassl, written for the tests: its names, its ways, and the three faults that it has on a new torch."""
