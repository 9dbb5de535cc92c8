"""One batch through one layer and one step through all layers: count, charge, commit, save."""
