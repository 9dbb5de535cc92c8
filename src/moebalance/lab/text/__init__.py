"""Text for experiments: corpora, tokenisers, and which sequence is read when."""
