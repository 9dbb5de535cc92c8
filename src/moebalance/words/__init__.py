"""What people type, and what it means: "phi+loss-free" → a method, "Tsallis" → a potential.

In reading order:
    methods     words, brackets and tables → methods
    potentials  names and tables → potentials, and lists of proportions
    reprs       the repr of a method → the method
    suggest     the nearest name, for errors
"""
