"""Words people type, such as "phi+loss-free", and the methods and potentials they mean."""
