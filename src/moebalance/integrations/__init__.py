"""One file a framework, imported only when its framework is in use."""
