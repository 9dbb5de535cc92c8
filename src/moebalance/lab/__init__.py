"""The workshop: data, training runs and comparisons, built on the public interface."""
