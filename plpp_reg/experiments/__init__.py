"""Many runs: protocols, sweeps, what executes them, the demonstration."""
