"""Settings: conf/ in types, and the rules between them."""
